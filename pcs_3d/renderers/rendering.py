"""The input and output of renderers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Generator, Tensor

from pcs_3d.cameras import Cameras

Shading = Literal["albedo", "lambertian", "textureless", "normal"]


@dataclass(frozen=True)
class Rendering:
    """B views of H×W pixels.

    pixels: [B, K, H, W] in [0, 1], on the background.
    opacity: [B, 1, H, W] in [0, 1].
    depth: [B, 1, H, W], the expected distance at which the ray hits something.
    normals: [B, 3, H, W] in world coordinates, of unit length where something is hit and 0 elsewhere. None if not
    requested.
    weights, distances: [B, H, W, S], the weight and distance of each sample along each ray, for penalties. None if the
    renderer does not march rays.
    """

    pixels: Tensor
    opacity: Tensor
    depth: Tensor
    normals: Tensor | None = None
    weights: Tensor | None = None
    distances: Tensor | None = None


@dataclass(frozen=True)
class RenderSettings:
    """How views are rendered.

    background: [B, K, H, W] or [B, K, 1, 1] in [0, 1].
    light: [B, 3], the position of a point light for each view, for shadings that use a light.
    """

    height: int
    width: int
    background: Tensor
    shading: Shading = "albedo"
    light: Tensor | None = None
    normals: bool = False
    generator: Generator | None = None  # for jitter along rays; without it, there is no jitter


class Renderer(Protocol):
    """Renders views of a field. The views are differentiable with respect to the field."""

    def render(self, field: Any, cameras: Cameras, settings: RenderSettings) -> Rendering: ...
