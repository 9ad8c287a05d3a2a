"""A region given by a signed distance. It is a ball or the inside of a mesh."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.meshes.shape import BallShape, shape_of_file
from pcs_3d.regions.base import Inside, RegionPart
from shared.config import PathText, Real

_CELLS, _REACH = 40, 1.5  # nodes along each side of the distance grid, and half its side length in radii


class Sdf(RegionPart):
    """The inside of a mesh, where the signed distance is negative. The mesh is read from the file `path` and scaled to
    `radius` around `center`. If no file is given, the region is a ball.

    grown: how far the region extends beyond the surface, in object radii.
    """

    kind: Literal["sdf"] = "sdf"
    path: PathText | None = None
    center: tuple[Real, Real, Real] = (0.0, 0.0, 0.0)
    radius: Annotated[float, Field(gt=0, le=10)] = 0.5
    up: Literal["y", "z"] | None = None  # as in `field.start`
    azimuth_deg: Real = 0.0
    grown: Annotated[float, Field(ge=0, le=1)] = 0.0

    def build(self) -> Inside:
        grid = None if self.path is None else self._grid()

        def inside(points: Tensor) -> Tensor:
            own = (points - torch.tensor(self.center, device=points.device, dtype=points.dtype)) / self.radius
            distance = BallShape(1.0).distance(own) if grid is None else _asked(grid.to(points), own)
            return self.faded(self.grown - self.radius * distance)

        return inside

    def _grid(self) -> Tensor:
        """Returns a grid of signed distances, `[1, 1, z, y, x]`."""
        assert self.path is not None
        line = torch.linspace(-_REACH, _REACH, _CELLS)
        z, y, x = torch.meshgrid(line, line, line, indexing="ij")
        places = torch.stack([x, y, z], -1).reshape(-1, 3)
        return (
            shape_of_file(self.path, self.up, self.azimuth_deg).distance(places).reshape(1, 1, _CELLS, _CELLS, _CELLS)
        )


def _asked(grid: Tensor, own: Tensor) -> Tensor:
    """Returns the distances (`[...]`) at points (`[..., 3]`). Points beyond the grid get the distance at its border."""
    place = own.reshape(1, -1, 1, 1, 3) / _REACH
    return F.grid_sample(grid, place, padding_mode="border", align_corners=True).reshape(own.shape[:-1])
