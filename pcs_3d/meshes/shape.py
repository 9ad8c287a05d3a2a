"""The shapes that fields start from. A shape provides a signed distance and, if known, a colour for any point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from scipy.spatial import KDTree

# Relative tolerance of nearest-point searches. At the centre of a ball, all surface points are equally near, and an
# exact search would visit every one of them.
_ROUGHLY = 0.05
_FEW = 2000  # number of surface points whose colours are used far from the surface
_RESOLUTION = 64  # largest number of cells along a side of the grid that separates inside from outside
_SAMPLES = 120_000  # number of points sampled on the surface of a mesh


class Shape(Protocol):
    """An object with a radius of about 1 around the origin. x points forward, y to the object's left, and z up."""

    def distance(self, points: Tensor) -> Tensor:
        """Returns the distance from each point (`[N, 3]`) to the surface, as `[N]`. Distances are negative inside."""
        ...

    def colors(self, points: Tensor) -> Tensor | None:
        """Returns the colour of the surface point nearest to each point (`[N, 3]`), as `[N, 3]` in [0, 1], or None if
        the shape has no colours."""
        ...

    def surface_points(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws `count` points (`[count, 3]`) that are spread over the surface."""
        ...


@dataclass(frozen=True)
class BallShape:
    """A ball around the origin, without colours."""

    radius: float

    def distance(self, points: Tensor) -> Tensor:
        return points.norm(dim=-1) - self.radius

    def colors(self, points: Tensor) -> Tensor | None:
        return None

    def surface_points(self, count: int, generator: torch.Generator) -> Tensor:
        return self.radius * F.normalize(torch.randn(count, 3, generator=generator), dim=-1)


class SampledShape:
    """A shape given by points on its surface.

    A point is inside if it cannot be reached from outside without crossing cells that contain surface points. This rule
    needs neither normals nor a closed surface. An open or non-manifold mesh becomes a shell one cell thick.

    Args:
        points: points on the surface, [N, 3], within a cube of side length 2 · `reach`
        colors: their colours, [N, 3] in [0, 1], or None
        normals: the outward unit normals at the points, [N, 3], if the surface is closed and its normals are reliable.
            Close to the surface, distances are then measured along the normals, with an error much smaller than a cell.
    """

    def __init__(
        self, points: np.ndarray, colors: np.ndarray | None, normals: np.ndarray | None = None, reach: float = 1.0
    ) -> None:
        from scipy import ndimage
        from scipy.spatial import KDTree

        self.points, self.point_colors, self.point_normals = points, colors, normals
        self._tree = KDTree(points, balanced_tree=False)
        self._few = np.arange(0, len(points), max(1, len(points) // _FEW))
        self._few_tree = KDTree(points[self._few])
        self._cell = _cell_size(points, self._tree, reach)
        size = math.ceil(2 * reach / self._cell) + 4  # includes a margin of outside cells
        self._half = size * self._cell / 2
        shell = np.zeros((size,) * 3, dtype=bool)
        shell[tuple(((points + self._half) / self._cell).astype(int).clip(0, size - 1).T)] = True
        filled = ndimage.binary_fill_holes(shell)
        core = filled & ~shell  # type: ignore[operator]
        to_core = np.asarray(ndimage.distance_transform_edt(~core)) if core.any() else np.full(shell.shape, np.inf)
        to_outside = np.asarray(ndimage.distance_transform_edt(filled))
        self._thin = to_core > 2  # walls and handles thinner than two cells, which have no core
        self._side = np.where(self._thin, 1.0, to_core - to_outside)  # positive outside

    def distance(self, points: Tensor) -> Tensor:
        from scipy import ndimage

        asked = points.detach().cpu().numpy().astype(np.float64)
        away, nearest = map(np.asarray, self._tree.query(asked, eps=_ROUGHLY))
        close = away < 3 * self._cell
        away[close], nearest[close] = self._tree.query(asked[close])
        places = ((asked + self._half) / self._cell - 0.5).T
        outside = ndimage.map_coordinates(self._side, places, order=1, mode="nearest") > 0
        thin = ndimage.map_coordinates(self._thin.astype(np.float32), places, order=0, mode="nearest") > 0
        signed = np.where(outside, away, -away)
        # Thin parts get a thickness of about one cell, because otherwise nothing would be inside them.
        signed = np.where(thin, away - 0.6 * self._cell, signed)
        if self.point_normals is not None:
            along = ((asked - self.points[nearest]) * self.point_normals[nearest]).sum(-1)
            signed = np.where(away < 1.5 * self._cell, along, signed)
        return torch.from_numpy(signed).float()

    def colors(self, points: Tensor) -> Tensor | None:
        if self.point_colors is None:
            return None
        asked = points.detach().cpu().numpy()
        away, nearest = map(np.asarray, self._tree.query(asked, distance_upper_bound=4 * self._cell))
        far = np.isinf(away)  # most nodes of a fine grid; an approximately nearest point suffices for them
        nearest[far] = self._few[self._few_tree.query(asked[far])[1]]
        return torch.from_numpy(self.point_colors[nearest]).float()

    def surface_points(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.points), (count,), generator=generator)
        return torch.from_numpy(self.points[chosen.numpy()]).float()


def _cell_size(points: np.ndarray, tree: KDTree, reach: float) -> float:
    """Returns a cell size at which almost every cell that the surface crosses contains a point. If points are spread at
    random, this requires 14 points per cell on average. A single hole would make the inside count as outside."""
    some = points[:: max(1, len(points) // 2000)]
    third = np.asarray(tree.query(some, k=min(4, len(points)))[0])[:, -1]
    return float(np.clip(np.sqrt(14 * np.pi / 3 * (third**2).mean()), 2 * reach / _RESOLUTION, 2 * reach / 7))


def shape_of_file(
    path: Path, up: Literal["y", "z"] | None = None, azimuth_deg: float = 0.0, radius: float = 1.0
) -> SampledShape:
    """Reads the shape from a GLB, OBJ or PLY file and scales it to `radius`. Raises ValueError in the same cases as
    `read_mesh`."""
    from pcs_3d.meshes.read_mesh import read_mesh, sampled

    points, colors = sampled(read_mesh(path, up, azimuth_deg), _SAMPLES)
    return SampledShape(radius * points, colors, reach=max(1.0, radius))
