"""Penalties on fields that are made of grids."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pcs_3d.fields.field import GridField
from pcs_3d.fields.tetrahedra import TetrahedraField
from pcs_3d.regularize.base import GeometryPenalty, Seen


class TotalVariation(GeometryPenalty):
    """The mean squared difference between neighbouring values in the field's grids."""

    kind: Literal["total_variation"] = "total_variation"

    def value(self, seen: Seen) -> Tensor:
        if not isinstance(seen.field, GridField):
            raise self.missing("a field made of grids, such as voxels, triplane or tetrahedra")
        return seen.field.total_variation()


class Eikonal(GeometryPenalty):
    """The mean of (|∇s| − 1)² near the surface, which makes the signed distance s a true distance
    (https://arxiv.org/abs/2002.10099)."""

    kind: Literal["eikonal"] = "eikonal"

    def value(self, seen: Seen) -> Tensor:
        field = _tetrahedra(self, seen)
        near = (field.distances.detach().abs() < 2.5).view(field.slopes().shape[:3])
        lengths = (field.slopes().square().sum(-1) + 1e-12).sqrt()
        return ((lengths - 1).square() * near).sum() / near.sum().clamp_min(1)


class Laplacian(GeometryPenalty):
    """The mean squared distance, in cells, between each vertex of a mesh and the mean of the vertex's neighbours."""

    kind: Literal["laplacian"] = "laplacian"

    def value(self, seen: Seen) -> Tensor:
        field = _tetrahedra(self, seen)
        surface = field.surface()
        # Each edge of a closed mesh occurs once in each direction.
        ends = surface.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
        summed = torch.zeros_like(surface.vertices).index_add(0, ends[:, 0], surface.vertices[ends[:, 1]])
        count = torch.bincount(ends[:, 0], minlength=len(summed)).clamp_min(1)[:, None]
        return ((summed / count - surface.vertices) / field.cell).square().sum(-1).mean()


def _tetrahedra(penalty: GeometryPenalty, seen: Seen) -> TetrahedraField:
    if not isinstance(seen.field, TetrahedraField):
        raise penalty.missing("field.kind=tetrahedra")
    return seen.field
