"""Fields whose renders have a closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.fields.base import BaseVolume
from pcs_3d.fields.field import Sample
from pcs_3d.renderers import Splat
from pcs_3d.renderers.rendering import RenderSettings

COLOR = (0.9, 0.2, 0.4)


@dataclass(frozen=True)
class Chords:
    """The intersections of rays with an object, `[B, H, W]`.

    near: the distance at which each ray enters the object.
    length: the length of each ray inside the object, which is 0 for rays that miss it.
    """

    near: Tensor
    length: Tensor


class Solid(BaseVolume):
    """A ball of radius `size`, or a cube of side length `2 * size`, with a uniform density and colour."""

    def __init__(self, size: float, density: float = 3.0, cube: bool = False, channels: int = 3) -> None:
        super().__init__(1.1, channels)
        self.size, self.cube = size, cube
        self.amount = torch.nn.Parameter(torch.tensor(float(density)))
        self.color = torch.nn.Parameter(torch.tensor([*COLOR, 0.7][:channels]))

    def at(self, points: Tensor) -> Sample:
        reach = points.abs().amax(-1) if self.cube else points.norm(dim=-1)
        inside = (reach < self.size).to(self.amount)
        return Sample(self.amount * inside, self.color.expand(*points.shape[:-1], -1))

    def trained(self):
        return [("all", list(self.parameters()), 1e-2)]

    def chords(self, cameras: Cameras, side: int) -> Chords:
        origins, directions = cameras.rays(side, side)
        if self.cube:
            first, second = (-self.size - origins) / directions, (self.size - origins) / directions
            near, far = torch.minimum(first, second).amax(-1), torch.maximum(first, second).amin(-1)
            return Chords(near, (far - near).clamp_min(0))
        middle = -(origins * directions).sum(-1)
        half = (self.size**2 - (origins.square().sum(-1) - middle**2)).clamp_min(0).sqrt()
        return Chords(middle - half, 2 * half)


@torch.no_grad()
def rendered_radius(field: Any) -> float:
    """Returns the radius of the disk with the area that a field of Gaussians covers by more than half, seen from far
    away."""
    away, side = Cameras.of([0.0], [0.0], 50.0, 3.0), 128
    covered = (Splat().render(field, away, view(1, side)).opacity > 0.5).float().mean()
    return math.sqrt(float(covered) / math.pi) * 2 * 50 * math.tan(math.radians(1.5))


def view(count: int, side: int = 32, background: float = 0.25, channels: int = 3, **changes) -> RenderSettings:
    return RenderSettings(side, side, torch.full((count, channels, 1, 1), background), **changes)
