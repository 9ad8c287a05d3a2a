"""Penalties on surface directions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.regularize.base import GeometryPenalty, Seen, seen_points


class Orientation(GeometryPenalty):
    """Σ sg(w) · max(0, n · d)², averaged over rays, which makes visible surfaces face the camera (Ref-NeRF,
    https://arxiv.org/abs/2112.03907, eq. 11).

    points: the number of samples from which the sum is estimated. They are drawn with probabilities proportional to
    their weights w.
    """

    kind: Literal["orientation"] = "orientation"
    points: Annotated[int, Setting(ge=16, le=1_000_000)] = 1024

    def value(self, seen: Seen) -> Tensor:
        points, directions = seen_points(self, seen, self.points)
        if not len(points):
            return seen.rendering.pixels.new_zeros(())
        behind = (seen.field.normals(points) * directions).sum(-1).clamp_min(0).square()
        return behind.mean() * seen.rendering.opacity.detach().mean()


class NormalSmoothness(GeometryPenalty):
    """The mean of |n(p) − n(p + ε)|² at `points` visible points p, which makes normals smooth in space. ε is Gaussian
    with a standard deviation of `reach` radii."""

    kind: Literal["normal_smoothness"] = "normal_smoothness"
    points: Annotated[int, Setting(ge=16, le=1_000_000)] = 1024
    reach: Annotated[float, Setting(gt=0, le=1)] = 0.02

    def value(self, seen: Seen) -> Tensor:
        points, _ = seen_points(self, seen, self.points)
        if not len(points):
            return seen.rendering.pixels.new_zeros(())
        where = points.device if seen.generator is None else seen.generator.device
        moved = points + self.reach * torch.randn(points.shape, generator=seen.generator, device=where).to(points)
        return (seen.field.normals(points) - seen.field.normals(moved)).square().sum(-1).mean()


class NormalImageSmoothness(GeometryPenalty):
    """The mean of |∇n|² over neighbouring pixels that both show the object (RealFusion,
    https://arxiv.org/abs/2302.10663, section 3.2)."""

    needs_normals: ClassVar[bool] = True
    kind: Literal["normal_image_smoothness"] = "normal_image_smoothness"

    def value(self, seen: Seen) -> Tensor:
        normals = seen.rendering.normals
        if normals is None:
            raise self.missing("views rendered with normals")
        hit = (seen.rendering.opacity.detach() > 0.5).to(normals)
        total, count = normals.new_zeros(()), normals.new_zeros(())
        for axis in (-1, -2):
            n = normals.shape[axis] - 1
            both = hit.narrow(axis, 0, n) * hit.narrow(axis, 1, n)
            step = (normals.narrow(axis, 1, n) - normals.narrow(axis, 0, n)).square().sum(1, keepdim=True)
            total, count = total + (step * both).sum(), count + both.sum()
        return total / count.clamp_min(1)


class NormalConsistency(GeometryPenalty):
    """The mean of 1 − cos α, where α is the angle between the normals of triangles that share an edge. This makes a
    mesh smooth."""

    kind: Literal["normal_consistency"] = "normal_consistency"

    def value(self, seen: Seen) -> Tensor:
        from pcs_3d.fields.field import SurfaceField

        if not isinstance(seen.field, SurfaceField):
            raise self.missing("a field rendered as triangles")
        surface = seen.field.surface()
        a, b, c = surface.vertices[surface.faces].unbind(1)
        normals = F.normalize(torch.linalg.cross(b - a, c - a, dim=-1), dim=-1, eps=1e-12)
        edges = surface.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).sort(-1).values
        key = edges[:, 0] * len(surface.vertices) + edges[:, 1]
        key, order = key.sort(stable=True)
        twin = (key[1:] == key[:-1]).nonzero()[:, 0]
        one, two = order[twin] // 3, order[twin + 1] // 3
        return (1 - (normals[one] * normals[two]).sum(-1)).mean()
