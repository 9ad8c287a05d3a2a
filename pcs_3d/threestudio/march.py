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
    chunk: rays at a time, where nothing is learned."""

    radius: float = 1.0
    samples: int = 64
    importance: int = 0
    chunk: int = 4096

    def render(self, parts: Parts, rays: Rays, training: bool, generator: Generator | None = None) -> dict[str, Tensor]:
        """`comp_rgb`, `comp_rgb_fg` and `comp_rgb_bg` [B, H, W, C], `opacity`, `depth` and `z_variance` [B, H, W, 1], with
        normals `comp_normal` [B, H, W, 3]; in training also what is known of each of the M samples: `weights`, `t_points`,
        `t_intervals` [M, 1], `t_dirs`, `points` [M, 3], `ray_indices` [M] and the geometry's own output."""
        b, h, w = rays.directions.shape[:3]
        flat = [v.reshape(-1, 3) for v in (rays.origins, rays.directions, rays.lights_like_directions())]
        chunks = [flat] if training else list(zip(*(v.split(self.chunk) for v in flat), strict=True))
        drawn = [self._rays(parts, *chunk, generator) for chunk in chunks]
        seen = {k: torch.cat([d.pixels[k] for d in drawn]).reshape(b, h, w, -1) for k in drawn[0].pixels}
        own = parts.background(dirs=rays.directions)
        behind = own if rays.behind is None else rays.behind
        whole = seen["comp_rgb_fg"] + (1 - seen["opacity"]) * behind
        out = {**seen, "comp_rgb_bg": own, "comp_rgb": whole}
        return {**out, **drawn[0].samples} if training else out

    def _rays(self, parts: Parts, origins: Tensor, directions: Tensor, lights: Tensor, generator: Any) -> Drawn:
        from nerfacc import render_weight_from_density

        edges = self._edges(parts, origins, directions, generator)
        n, s = edges.shape[0], edges.shape[1] - 1
        middles = (edges[:, 1:] + edges[:, :-1]) / 2
        ray = torch.arange(n, device=edges.device).repeat_interleave(s)
        t, along = middles.reshape(-1, 1), directions[ray]
        points = origins[ray] + t * along
        found = parts.geometry(points, output_normal=parts.material.requires_normal)
        if "density" not in found:
            raise ValueError(
                f"renderer: pcs-volume-renderer marches through densities, and {type(parts.geometry).__name__} has none"
            )
        colors = parts.material(viewdirs=along, positions=points, light_positions=lights[ray], **found, **parts.shading)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], found["density"].reshape(n, s))[0]

        def summed(values: Tensor) -> Tensor:
            return (weights[..., None] * values.reshape(n, s, -1)).sum(1)

        opacity = weights.sum(-1, keepdim=True)
        depth = summed(t)
        mean = depth / opacity.clamp_min(1e-5)
        spread = (weights * (middles - mean) ** 2).sum(-1, keepdim=True) / opacity.clamp_min(1e-5)
        pixels = {
            "comp_rgb_fg": summed(colors),
            "opacity": opacity,
            "depth": depth,
            "z_variance": spread * (opacity > 0.5),
        }
        if "normal" in found:
            pixels["comp_normal"] = (F.normalize(summed(found["normal"]), dim=-1) + 1) / 2 * opacity
        samples = {
            "weights": weights.reshape(-1, 1),
            "t_points": t,
            "t_intervals": (edges[:, 1:] - edges[:, :-1]).reshape(-1, 1),
            "t_dirs": along,
            "ray_indices": ray,
            "points": points,
            **found,
        }
        return Drawn(pixels, samples)

    @torch.no_grad()
    def _edges(self, parts: Parts, origins: Tensor, directions: Tensor, generator: Generator | None) -> Tensor:
        """[N, samples + importance + 1]."""
        from nerfacc import render_weight_from_density

        near, far = through_cube(origins, directions, self.radius)
        edges = stratified(near, torch.maximum(near, far), self.samples, generator)  # a ray that misses has no length
        if not self.importance:
            return edges
        middles = (edges[:, 1:] + edges[:, :-1]) / 2
        points = origins[:, None] + middles[..., None] * directions[:, None]
        density = parts.geometry.forward_density(points.reshape(-1, 3)).reshape(middles.shape)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], density)[0]
        return by_importance(edges, weights, self.samples + self.importance, generator)


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
