"""Marches rays through a field (NeRF, https://arxiv.org/abs/2003.08934), using nerfacc's batched rendering
functions. nerfacc's occupancy grid is not used, because rays can be traced through it only on CUDA; `Volume.hidden`
skips empty space on every device."""

from __future__ import annotations

from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field as Setting
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from pcs_3d.cameras import Cameras
from pcs_3d.fields.base import unit
from pcs_3d.fields.field import VolumeField
from pcs_3d.renderers.base import RendererPart
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from pcs_3d.renderers.sampling import by_importance, stratified, through_cube
from pcs_3d.renderers.shading import lamps, needs_normals, shaded


class Volume(RendererPart):
    """Renders a field by marching rays through it.

    samples: the number of samples along each ray inside the field's bound.
    importance: the number of additional samples. If it is above 0, all samples are placed according to the density
    found in a first pass.
    hidden: samples whose weight in their pixel is guaranteed to be at most this value are skipped and receive no
    gradient. Most of them lie in empty cells or behind the surface.
    rays: the number of rays rendered at a time.
    recompute: whether the activations of the samples are recomputed in the backward pass, chunk by chunk. This takes
    less memory and more time, and leaves the gradient unchanged.
    """

    draws: ClassVar[type] = VolumeField
    kind: Literal["volume"] = "volume"
    samples: Annotated[int, Setting(ge=2, le=4096)] = 64
    importance: Annotated[int, Setting(ge=0, le=4096)] = 0
    hidden: Annotated[float, Setting(ge=0, lt=0.1)] = 5e-4
    rays: Annotated[int, Setting(ge=256, le=10_000_000)] = 16384
    recompute: bool = False

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
        """Renders rays given as `[N, 9]` (origin, direction, lamp). Returns colours, opacity, depth, normals, and the
        weights and distances of the samples."""
        with torch.no_grad():
            edges = self._edges(field, rays, settings.generator)
            middles = (edges[:, 1:] + edges[:, :-1]) / 2
            kept, hit = self._worthwhile(field, rays, edges, middles)
        draw = partial(self._drawn, field, rays, settings, edges, (kept, hit))
        if self.recompute and torch.is_grad_enabled():  # the random sample positions above are reused
            return checkpoint(draw, use_reentrant=False, preserve_rng_state=False)
        return draw()

    def _drawn(
        self, field: VolumeField, rays: Tensor, settings: RenderSettings, edges: Tensor, chosen: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, ...]:
        """Renders the rays from the samples that `_worthwhile` has chosen."""
        from nerfacc import accumulate_along_rays

        (kept, hit), middles = chosen, (edges[:, 1:] + edges[:, :-1]) / 2
        n, s = middles.shape
        ray = kept // s
        away = middles.view(-1).index_select(0, kept)[:, None]
        points = torch.addcmul(rays[ray, :3], away, rays[ray, 3:6])
        sample = field.at(points)
        weights = _weights(edges, sample.density, kept, hit)
        each = weights.view(-1).index_select(0, kept)
        want = settings.normals or needs_normals(settings)
        normals = field.normals(points) if want else None
        seen = shaded(sample.features, normals, points, rays[ray, 6:], settings)
        opacity = weights.sum(-1, keepdim=True)
        depth = accumulate_along_rays(each, away, ray, n) / opacity.clamp_min(1e-6)
        facing = opacity.new_zeros(n, 3) if normals is None else accumulate_along_rays(each, normals, ray, n)
        colors = accumulate_along_rays(each, seen, ray, n)
        facing = torch.where(opacity > 1e-3, unit(facing), torch.zeros_like(facing))
        return colors, opacity, depth, facing, weights, middles

    def _edges(self, field: VolumeField, rays: Tensor, generator: Generator | None) -> Tensor:
        from nerfacc import render_weight_from_density

        near, far = through_cube(rays[:, :3], rays[:, 3:6], field.bound)
        far = torch.maximum(near, far)  # the intervals of a ray that misses the cube have length and weight 0
        edges = stratified(near, far, self.samples, generator)
        if not self.importance:
            return edges
        least, most = field.between(rays[:, :3], rays[:, 3:6], (edges[:, 1:] + edges[:, :-1]) / 2)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], (least + most) / 2)[0]
        return by_importance(edges, weights, self.samples + self.importance, generator)

    def _worthwhile(self, field: VolumeField, rays: Tensor, edges: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the samples whose weight may exceed `hidden`, as indices into `[N · S]`, and the rays that they lie
        on (`[M]`)."""
        from nerfacc import render_transmittance_from_density

        least, most = field.between(rays[:, :3], rays[:, 3:6], middles)
        most = most * (edges[:, 1:] - edges[:, :-1])  # now an upper bound on each sample's weight
        hit = (most > self.hidden).any(-1).nonzero()[:, 0]
        if not len(hit):
            hit = hit.new_zeros(1)
        edges = edges[hit]
        passed, _ = render_transmittance_from_density(edges[:, :-1], edges[:, 1:], least[hit])
        kept = (passed * -torch.expm1(-most[hit]) > self.hidden).nonzero()
        kept = hit[kept[:, 0]] * middles.shape[1] + kept[:, 1]
        if not len(kept):
            kept = hit[:1] * middles.shape[1]  # keep one sample, so that a gradient of 0 reaches the field
        return kept, hit


def _weights(edges: Tensor, density: Tensor, kept: Tensor, hit: Tensor) -> Tensor:
    """Returns the weight of each sample in its pixel (`[N, S]`), given the edges between samples (`[N, S + 1]`). Only
    the samples with indices `kept` have a density, and all of them lie on the rays `hit`."""
    from nerfacc import render_weight_from_density

    n, s = len(edges), edges.shape[1] - 1
    place = torch.zeros(n, dtype=torch.long, device=edges.device).index_put((hit,), torch.arange(len(hit)).to(hit))
    numbers = place[kept // s] * s + kept % s
    dense = density.new_zeros(len(hit) * s).index_put((numbers,), density).view(-1, s)
    own = edges[hit]
    weights = render_weight_from_density(own[:, :-1], own[:, 1:], dense)[0]
    return weights.new_zeros(n, s).index_copy(0, hit, weights)
