"""Aligns a mesh with the real object, using only scale and translation, so that a front on the wrong
side is not corrected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras
from pcs_3d.evaluation.views import PaintedMesh, silhouettes

_SIDE = 64  # side length in pixels of the silhouettes that are compared in the first, coarse search
_MOMENTS = 4  # number of iterations that match the size and centre to the truth's
_EVERY = 2  # only every second view is used
# Steps of the search for the best overlap, as shares of the size and as shifts in radii.
_COARSE, _FINE = (0.06, 0.03, 0.015), (0.006, 0.003)
_LIMITS = (0.1, 10.0)  # bounds on the scale


@dataclass(frozen=True)
class _Outlines:
    """The areas (`[B]`) and centres (`[B, 2]`; x right, y up, -1 to 1) of B silhouettes."""

    areas: Tensor
    middles: Tensor

    @staticmethod
    def of(masks: Tensor) -> _Outlines:
        side = masks.shape[-1]
        at = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
        solid = masks.double()
        areas = solid.sum((1, 2))
        x = (solid.sum(1) * at).sum(1) / areas.clamp_min(1)
        y = -(solid.sum(2) * at).sum(1) / areas.clamp_min(1)
        return _Outlines(areas, torch.stack([x, y], -1))


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Returns the intersection over union of each pair of silhouettes (bool `[B, H, W]`), as `[B]`. It is 1 where both
    are empty."""
    both, either = (a & b).sum((1, 2)), (a | b).sum((1, 2))
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(either)).double()


def aligned(mesh: PaintedMesh, truth: Tensor, around: Cameras) -> PaintedMesh:
    """Scales and moves the mesh so that its silhouettes overlap the truth's as much as possible. Returns it unchanged if
    no other placement is better.

    A first guess from areas and centres is refined by a coordinate search. One size and one position apply to all
    views. The mesh is never rotated.

    Args:
        truth: silhouettes of the real object (bool `[B, H, W]`), as seen by the cameras `around`
    """
    around, truth = around[::_EVERY], truth[::_EVERY]
    if (given := _overlap(mesh, truth, around)) == 1:
        return mesh
    small = _smaller(truth)
    guess = _searched(_by_moments(mesh, small, around), small, around, _COARSE)
    return _searched(guess if _overlap(guess, truth, around) > given else mesh, truth, around, _FINE)


def _overlap(mesh: PaintedMesh, truth: Tensor, around: Cameras) -> float:
    side = truth.shape[-1]
    return float(iou(silhouettes(mesh, around, side, 1 if side == _SIDE else 2), truth).mean())


def _searched(mesh: PaintedMesh, truth: Tensor, around: Cameras, steps: Sequence[float]) -> PaintedMesh:
    best = _overlap(mesh, truth, around)
    for step in steps:
        for axis in range(4):
            for sign in (1, -1):
                moved = _moved(mesh, axis, sign * step)
                if best < 1 and (found := _overlap(moved, truth, around)) > best:
                    mesh, best = moved, found
                    break
    return mesh


def _smaller(masks: Tensor) -> Tensor:
    """Resizes silhouettes (`[B, H, W]`) to bool `[B, 64, 64]`."""
    return F.adaptive_avg_pool2d(masks.float()[:, None], _SIDE)[:, 0] >= 0.5


def _moved(mesh: PaintedMesh, axis: int, by: float) -> PaintedMesh:
    offset = list(mesh.offset)
    if axis == 3:
        return mesh.placed(mesh.scale * (1 + by), mesh.offset)
    offset[axis] += by
    return mesh.placed(mesh.scale, (offset[0], offset[1], offset[2]))


def _by_moments(mesh: PaintedMesh, truth: Tensor, around: Cameras) -> PaintedMesh:
    wanted = _Outlines.of(truth)
    axes = around.axes[:, :2].double()  # right and up of each view
    for _ in range(_MOMENTS):
        found = _Outlines.of(silhouettes(mesh, around, _SIDE, 1))
        if not bool(found.areas.sum() > 0) or not bool(wanted.areas.sum() > 0):
            break
        larger = math.sqrt(float(wanted.areas.sum() / found.areas.sum()))
        scale = min(max(mesh.scale * larger, _LIMITS[0]), _LIMITS[1])
        # half the width of each view, in radii, at the object's distance
        width = (around.distance / around.focal).double()[:, None]
        shift = torch.linalg.lstsq(axes.reshape(-1, 3), ((wanted.middles - found.middles) * width).reshape(-1, 1))
        x, y, z = (torch.tensor(mesh.offset, dtype=torch.float64) + shift.solution[:, 0]).tolist()
        mesh = mesh.placed(scale, (x, y, z))
    return mesh
