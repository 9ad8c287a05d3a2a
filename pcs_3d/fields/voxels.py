"""A field on a dense grid (DVGO, https://arxiv.org/abs/2111.11215), which is the fastest field on a CPU."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn
from torch.nn import functional as F

from pcs_3d.fields import grids
from pcs_3d.fields.base import BaseVolume, FieldPart, unit
from pcs_3d.fields.field import Sample
from pcs_3d.fields.starts import first_grid
from shared.trainable.base import Rate


class Voxels(FieldPart):
    """A dense grid of densities and colours with `resolution`³ nodes. Values are interpolated before softplus and
    sigmoid, so that surfaces can be sharper than a cell."""

    kind: Literal["voxels"] = "voxels"
    resolution: Annotated[int, Setting(ge=4, le=512)] = 64  # nodes along each side of the grid
    lr: Rate = 0.2
    lr_features: Rate | None = 0.1

    def build(self, channels: int = 3, seed: int = 0) -> VoxelField:
        return VoxelField(self, channels)


class VoxelField(BaseVolume):
    """The grids of densities (`[R, R, R, 1]`) and features (`[R, R, R, K]`). Densities are stored before softplus is
    applied, and colours before the sigmoid is applied."""

    def __init__(self, part: Voxels, channels: int) -> None:
        super().__init__(part.bound, channels)
        first = first_grid(part.start, part.resolution, part.bound, channels)
        self.part = part
        self._cells: tuple[Any, tuple[Tensor, Tensor]] | None = None
        self.raw_density = nn.Parameter(first[..., :1].clone())
        self.raw_features = nn.Parameter(first[..., 1:].clone())

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        return [
            ("density", [self.raw_density], self.part.lr),
            ("features", [self.raw_features], self.part.feature_rate),
        ]

    def at(self, points: Tensor) -> Sample:
        both = torch.cat([self.raw_density, self.raw_features], -1)  # one lookup for both
        raw = grids.trilinear(both, points, self.bound)
        return Sample(F.softplus(raw[..., 0]) * self.inside(points), self.colored(raw[..., 1:]))

    def density(self, points: Tensor) -> Tensor:
        raw = grids.trilinear(self.raw_density, points, self.bound)[..., 0]
        return F.softplus(raw) * self.inside(points)

    def between(self, origins: Tensor, directions: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        version = self.raw_density._version, self.raw_density.data_ptr()
        if self._cells is None or self._cells[0] != version:  # recomputed whenever the optimizer has changed the grid
            raw = F.softplus(self.raw_density.detach()[..., 0])
            self._cells = version, (-grids.cell_maxima(-raw), grids.cell_maxima(raw))
        (least, most), inside = grids.of_cells(self._cells[1], origins, directions, distances, self.bound)
        return least * inside, most

    def normals(self, points: Tensor) -> Tensor:
        slope = grids.slopes(self.raw_density[..., 0], self.bound)
        return unit(-grids.trilinear(slope, points, self.bound))

    def total_variation(self) -> Tensor:
        """Returns the sum of the total variations of the densities before softplus and the features before the
        sigmoid."""
        return grids.total_variation(self.raw_density) + grids.total_variation(self.raw_features)
