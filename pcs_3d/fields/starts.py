"""What a field holds before its first step: a blob, or what is in a file."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from pcs_3d.fields.grids import nodes
from pcs_3d.meshes.shape import BallShape, Shape, shape_of_file
from shared.config import KindPart, PathText, default_kind


class StartPart(KindPart):
    """Base of the starts. density: inside, per radius; softness: within how many radii of the surface it is small: soft
    things look as large as hard ones."""

    density: Annotated[float, Setting(gt=0, le=1000)] = 10.0
    softness: Annotated[float, Setting(gt=0, le=1)] = 0.1

    def shape(self) -> Shape:
        """How far each point is from the surface, and its colours there."""
        raise NotImplementedError


class Blob(StartPart):
    """A soft grey ball, as in DreamFusion (https://arxiv.org/abs/2209.14988, appendix A.2), of so many radii of the thing."""

    kind: Literal["blob"] = "blob"
    radius: Annotated[float, Setting(gt=0, le=10)] = 0.5

    def shape(self) -> Shape:
        return BallShape(self.radius)


class MeshFile(StartPart):
    """A mesh or points: GLB, OBJ or PLY, brought to radius 1 around the origin.

    up: which of the file's axes is up; None: z in PLY, y elsewhere, as the formats have it. azimuth_deg: the thing is turned
    so far to its left, for files whose front is elsewhere.
    """

    kind: Literal["file"] = "file"
    density: Annotated[float, Setting(gt=0, le=1000)] = 40.0
    softness: Annotated[float, Setting(gt=0, le=1)] = 0.03
    path: PathText
    up: Literal["y", "z"] | None = None
    azimuth_deg: float = 0.0

    def shape(self) -> Shape:
        return shape_of_file(self.path, self.up, self.azimuth_deg)


Start = Annotated[Blob | MeshFile, Setting(discriminator="kind"), default_kind("blob")]


def first_grid(start: StartPart, resolution: int, bound: float, channels: int) -> Tensor:
    """[R, R, R, 1 + K] values without bounds at nodes: of the density before softplus and of the colours before sigmoid.

    Where a file has colours, and K is 3, they are there; else grey, or latents of 0.
    """
    shape, places = start.shape(), nodes(resolution, bound).reshape(-1, 3)
    solid = torch.sigmoid(-4 * (shape.distance(places) / start.softness + 1))  # 2 % of it at the surface
    raw = inverse_softplus((start.density * solid).clamp_min(1e-4))
    features = torch.zeros(len(places), channels)
    if channels == 3 and (colors := shape.colors(places)) is not None:
        features = colors.clamp(0.02, 0.98).logit()
    return torch.cat([raw[:, None], features], 1).reshape(resolution, resolution, resolution, -1)


def inverse_softplus(value: Tensor) -> Tensor:
    """What softplus makes `value` of."""
    return value + torch.log(-torch.expm1(-value))
