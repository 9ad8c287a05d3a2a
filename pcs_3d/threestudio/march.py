"""Rays marched through a geometry of threestudio in one batch, with what its systems read of a renderer.

No CUDA kernel: intervals are drawn by `pcs_3d.renderers.sampling`, and nerfacc's batched functions weigh them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from pcs_3d.renderers.sampling import by_importance, stratified, through_cube


@dataclass(frozen=True)
class March:
    """samples: intervals of a ray in the cube [-radius, radius]³; importance: so many more where a first look found something;
    hidden: samples that weigh less in their pixel are left out, gradient and all; chunk: rays at a time, where nothing is
    learned."""

    radius: float = 1.0
    samples: int = 64
    importance: int = 0
    hidden: float = 5e-4
    chunk: int = 4096

    def render(self, parts: Parts, rays: Rays, training: bool, generator: Generator | None = None) -> dict[str, Tensor]:
        """`comp_rgb`, `comp_rgb_fg` and `comp_rgb_bg` [B, H, W, C], `opacity`, `depth` and `z_variance` [B, H, W, 1], with
        normals `comp_normal` [B, H, W, 3]; in training also what is known of each of the M samples: `weights`, `t_points`,
        `t_intervals` [M, 1], `t_dirs`, `points` [M, 3], `ray_indices` [M] and the geometry's own output.

        Raises ValueError for a geometry without densities.
        """
        if not hasattr(parts.geometry, "forward_density"):
            name = type(parts.geometry).__name__
            raise ValueError(f"renderer: pcs-volume-renderer marches through densities, and {name} has none")
        b, h, w = rays.directions.shape[:3]
        flat = torch.cat([rays.origins, rays.directions, rays.lights_like_directions()], -1).reshape(-1, 9)
        drawn = [self._rays(parts, each, generator) for each in ([flat] if training else flat.split(self.chunk))]
        seen = {k: torch.cat([d.pixels[k] for d in drawn]).reshape(b, h, w, -1) for k in drawn[0].pixels}
        own = parts.background(dirs=rays.directions)
        behind = own if rays.behind is None else rays.behind
        whole = seen["comp_rgb_fg"] + (1 - seen["opacity"]) * behind
        out = {**seen, "comp_rgb_bg": own, "comp_rgb": whole}
        return {**out, **drawn[0].samples} if training else out

    def _rays(self, parts: Parts, rays: Tensor, generator: Generator | None) -> Drawn:
        """Of rays [N, 9]: origin, direction, light."""
        from nerfacc import accumulate_along_rays, render_weight_from_density

        origins, directions, lights = rays.split(3, -1)
        edges = self._edges(parts, origins, directions, generator)
        n, s = len(edges), edges.shape[1] - 1
        kept = self._worthwhile(parts, origins, directions, edges)
        ray = kept // s
        t = middles(edges).reshape(-1, 1)[kept]
        along = directions[ray]
        points = origins[ray] + t * along
        found = parts.geometry(points, output_normal=parts.material.requires_normal)
        colors = parts.material(viewdirs=along, positions=points, light_positions=lights[ray], **found, **parts.shading)
        density = found["density"].new_zeros(n * s).index_put((kept,), found["density"][:, 0]).view(n, s)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], density)[0].reshape(-1)[kept]

        def summed(values: Tensor) -> Tensor:
            return accumulate_along_rays(weights, values, ray, n)

        opacity, depth = summed(torch.ones_like(t)), summed(t)
        there = opacity.clamp_min(1e-5)
        spread = summed((t - (depth / there)[ray]) ** 2) / there
        pixels = {
            "comp_rgb_fg": summed(colors),
            "opacity": opacity,
            "depth": depth,
            "z_variance": spread * (opacity > 0.5),
        }
        if "normal" in found:
            pixels["comp_normal"] = (F.normalize(summed(found["normal"]), dim=-1) + 1) / 2 * opacity
        lengths = (edges[:, 1:] - edges[:, :-1]).reshape(-1, 1)[kept]
        each = {"weights": weights[:, None], "t_points": t, "t_intervals": lengths, "t_dirs": along}
        return Drawn(pixels, {**each, "ray_indices": ray, "points": points, **found})

    @torch.no_grad()
    def _worthwhile(self, parts: Parts, origins: Tensor, directions: Tensor, edges: Tensor) -> Tensor:
        """Which samples weigh more than `hidden`, as numbers in [N · S]; at least one, so that a gradient reaches the
        geometry."""
        from nerfacc import render_weight_from_density

        if not self.hidden:
            return torch.arange(edges[:, 1:].numel(), device=edges.device)
        density = densities(parts, origins, directions, edges)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], density)[0]
        kept = (weights > self.hidden).view(-1).nonzero()[:, 0]
        return kept if len(kept) else kept.new_zeros(1)

    @torch.no_grad()
    def _edges(self, parts: Parts, origins: Tensor, directions: Tensor, generator: Generator | None) -> Tensor:
        """[N, samples + importance + 1]."""
        from nerfacc import render_weight_from_density

        near, far = through_cube(origins, directions, self.radius)
        edges = stratified(near, torch.maximum(near, far), self.samples, generator)  # a ray that misses has no length
        if not self.importance:
            return edges
        density = densities(parts, origins, directions, edges)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], density)[0]
        return by_importance(edges, weights, self.samples + self.importance, generator)


def middles(edges: Tensor) -> Tensor:
    """[N, S + 1] -> [N, S]."""
    return (edges[:, 1:] + edges[:, :-1]) / 2


def densities(parts: Parts, origins: Tensor, directions: Tensor, edges: Tensor) -> Tensor:
    """In the middles of intervals, [N, S]."""
    points = origins[:, None] + middles(edges)[..., None] * directions[:, None]
    return parts.geometry.forward_density(points.reshape(-1, 3)).reshape(len(edges), -1)


def check_cameras(c2w: Tensor) -> None:
    """ValueError where the axes of cameras [B, 4, 4] are not at right angles. threestudio's data modules cross those of exactly
    three cameras along the wrong dimension, and rays then go anywhere."""
    axes = c2w[:, :3, :3].float()
    if not torch.allclose(axes @ axes.mT, torch.eye(3, device=axes.device).expand_as(axes), atol=1e-3):
        raise ValueError(
            "the axes of the cameras are not at right angles: threestudio computes those of exactly three cameras wrongly; "
            "set data.batch_size, data.n_val_views and data.n_test_views to other numbers than 3"
        )


@dataclass(frozen=True)
class Parts:
    """threestudio's modules, and what its systems say of the shading."""

    geometry: Any
    material: Any
    background: Any
    shading: dict[str, Any]


@dataclass(frozen=True)
class Rays:
    """origins, directions (unit): [B, H, W, 3]; lights: [B, 3]; behind: colours [B, H, W, C] or [B, 1, 1, C] that take the
    background's place."""

    origins: Tensor
    directions: Tensor
    lights: Tensor
    behind: Tensor | None = None

    def lights_like_directions(self) -> Tensor:
        """[B, H, W, 3]."""
        return self.lights[:, None, None].expand_as(self.directions)


@dataclass(frozen=True)
class Drawn:
    """Of N rays: what their pixels show [N, K], and what is known of their samples."""

    pixels: dict[str, Tensor]
    samples: dict[str, Tensor]
