"""Rays marched through a field (NeRF, https://arxiv.org/abs/2003.08934), with nerfacc's batched rendering functions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Generator, Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.fields.base import unit
from pcs_3d.fields.field import VolumeField
from pcs_3d.renderers.base import RendererPart
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from pcs_3d.renderers.sampling import by_importance, stratified, through_cube
from pcs_3d.renderers.shading import lamps, needs_normals, shaded


class Volume(RendererPart):
    """samples: along each ray, between where it enters and leaves the field's bound; importance: so many more where a first
    look finds something, all of them there; hidden: samples that certainly weigh less in their pixel are left out, gradient
    and all, for most lie in empty cells or behind the surface; rays: drawn at a time."""

    draws: ClassVar[type] = VolumeField
    kind: Literal["volume"] = "volume"
    samples: Annotated[int, Setting(ge=2, le=4096)] = 64
    importance: Annotated[int, Setting(ge=0, le=4096)] = 0
    hidden: Annotated[float, Setting(ge=0, lt=0.1)] = 5e-4
    rays: Annotated[int, Setting(ge=256)] = 16384

    def render(self, field: VolumeField, cameras: Cameras, settings: RenderSettings) -> Rendering:
        self.check(field, cameras, settings)
        b, h, w = len(cameras), settings.height, settings.width
        origins, directions = (r.reshape(-1, 3) for r in cameras.rays(h, w))
        lamp = lamps(cameras, settings)[:, None].expand(b, h * w, 3).reshape(-1, 3)
        rays = torch.cat([origins, directions, lamp], 1)
        parts = [self._rays(field, chunk, settings) for chunk in rays.split(self.rays)]
        pixels, opacity, depth, normals, weights, distances = (torch.cat(p) for p in zip(*parts, strict=True))

        def picture(values: Tensor) -> Tensor:
            return values.reshape(b, h, w, -1).permute(0, 3, 1, 2)

        seen = picture(opacity)
        return Rendering(
            picture(pixels) + (1 - seen) * settings.background.to(seen),
            seen,
            picture(depth),
            picture(normals) if settings.normals or needs_normals(settings) else None,
            weights.reshape(b, h, w, -1),
            distances.reshape(b, h, w, -1),
        )

    def _rays(self, field: VolumeField, rays: Tensor, settings: RenderSettings) -> tuple[Tensor, ...]:
        """Of rays [N, 9] (origin, direction, lamp): colours, opacity, depth, normals, and the samples' weights and places."""
        from nerfacc import accumulate_along_rays, render_weight_from_density

        with torch.no_grad():
            edges = self._edges(field, rays, settings.generator)
            middles = (edges[:, 1:] + edges[:, :-1]) / 2
            kept, points = self._worthwhile(field, rays, edges)
        n, s = middles.shape
        ray = kept // s
        sample = field.at(points)
        density = sample.density.new_zeros(n * s).index_put((kept,), sample.density).view(n, s)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], density)[0]
        each = weights.view(-1).index_select(0, kept)
        want = settings.normals or needs_normals(settings)
        normals = field.normals(points) if want else None
        seen = shaded(sample.features, normals, points, rays[ray, 6:], settings)
        opacity = weights.sum(-1, keepdim=True)
        depth = (weights * middles).sum(-1, keepdim=True) / opacity.clamp_min(1e-6)
        facing = opacity.new_zeros(n, 3) if normals is None else accumulate_along_rays(each, normals, ray, n)
        colors = accumulate_along_rays(each, seen, ray, n)
        facing = torch.where(opacity > 1e-3, unit(facing), torch.zeros_like(facing))
        return colors, opacity, depth, facing, weights, middles

    def _edges(self, field: VolumeField, rays: Tensor, generator: Generator | None) -> Tensor:
        from nerfacc import render_weight_from_density

        near, far = through_cube(rays[:, :3], rays[:, 3:6], field.bound)
        far = torch.maximum(near, far)  # of a ray that misses the cube all intervals have no length, and weigh nothing
        edges = stratified(near, far, self.samples, generator)
        if not self.importance:
            return edges
        least, most, _ = _first_look(field, rays, edges)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], (least + most) / 2)[0]
        return by_importance(edges, weights, self.samples + self.importance, generator)

    def _worthwhile(self, field: VolumeField, rays: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples may weigh more than `hidden`, as numbers in [N · S], and their points."""
        from nerfacc import render_transmittance_from_density

        least, most, points = _first_look(field, rays, edges)
        passed, _ = render_transmittance_from_density(edges[:, :-1], edges[:, 1:], least)
        weights = passed * -torch.expm1(-most * (edges[:, 1:] - edges[:, :-1]))
        kept = (weights > self.hidden).view(-1).nonzero()[:, 0]
        if not len(kept):
            kept = kept.new_zeros(1)  # one, so that a gradient of 0 reaches the field
        return kept, points.view(-1, 3).index_select(0, kept)


def _first_look(field: VolumeField, rays: Tensor, edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Densities [N, S] that those in the middles of intervals lie between, and these points [N, S, 3]."""
    middles = (edges[:, 1:] + edges[:, :-1]) / 2
    points = rays[:, None, :3] + middles[..., None] * rays[:, None, 3:6]
    return *field.between(points), points
