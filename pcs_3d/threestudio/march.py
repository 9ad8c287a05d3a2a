"""Marches rays through a threestudio geometry in one batch, and returns the outputs that threestudio's systems expect
from a renderer.

No CUDA kernels are needed: the intervals come from `pcs_3d.renderers.sampling`, and the weights come from nerfacc's
batched functions.
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
    """The settings for ray marching.

    samples: the number of intervals along each ray in the cube [-radius, radius]³.
    importance: the number of additional intervals. If it is above 0, a first pass finds where there is density, and all
    intervals are placed there.
    hidden: samples whose weight in their pixel does not exceed this value are skipped and receive no gradient.
    chunk: the number of rays rendered at a time outside training.
    """

    radius: float = 1.0
    samples: int = 64
    importance: int = 0
    hidden: float = 5e-4
    chunk: int = 4096

    def render(self, parts: Parts, rays: Rays, training: bool, generator: Generator | None = None) -> dict[str, Tensor]:
        """Renders the rays of B views.

        Returns:
            A dictionary with the values of each pixel: `comp_rgb`, `comp_rgb_fg` and `comp_rgb_bg` ([B, H, W, C]),
            `opacity`, `depth` and `z_variance` ([B, H, W, 1]) and, if the geometry has normals, `comp_normal`
            ([B, H, W, 3]). In training, the dictionary also has the values of each of the M samples: `weights`,
            `t_points` and `t_intervals` ([M, 1]), `t_dirs` and `points` ([M, 3]), `ray_indices` ([M]) and the
            geometry's own output.

        Raises:
            ValueError: the geometry has no densities
        """
        if not hasattr(parts.geometry, "forward_density"):
            name = type(parts.geometry).__name__
            raise ValueError(f"renderer: pcs-volume-renderer needs a density, but {name} has none")
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
        """Renders rays given as `[N, 9]` (origin, direction, light)."""
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
        """Returns the indices, from 0 to N · S - 1, of the samples whose weight exceeds `hidden`. At least one index is
        always returned, so that a gradient reaches the geometry."""
        from nerfacc import render_weight_from_density

        if not self.hidden:
            return torch.arange(edges[:, 1:].numel(), device=edges.device)
        density = densities(parts, origins, directions, edges)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], density)[0]
        kept = (weights > self.hidden).view(-1).nonzero()[:, 0]
        return kept if len(kept) else kept.new_zeros(1)

    @torch.no_grad()
    def _edges(self, parts: Parts, origins: Tensor, directions: Tensor, generator: Generator | None) -> Tensor:
        """Returns the edges of the intervals, `[N, samples + importance + 1]`."""
        from nerfacc import render_weight_from_density

        near, far = through_cube(origins, directions, self.radius)
        edges = stratified(near, torch.maximum(near, far), self.samples, generator)  # length 0 if a ray misses
        if not self.importance:
            return edges
        density = densities(parts, origins, directions, edges)
        weights = render_weight_from_density(edges[:, :-1], edges[:, 1:], density)[0]
        return by_importance(edges, weights, self.samples + self.importance, generator)


def middles(edges: Tensor) -> Tensor:
    """Returns the midpoints (`[N, S]`) of the intervals between edges (`[N, S + 1]`)."""
    return (edges[:, 1:] + edges[:, :-1]) / 2


def densities(parts: Parts, origins: Tensor, directions: Tensor, edges: Tensor) -> Tensor:
    """Returns the densities at the midpoints of the intervals, `[N, S]`."""
    points = origins[:, None] + middles(edges)[..., None] * directions[:, None]
    return parts.geometry.forward_density(points.reshape(-1, 3)).reshape(len(edges), -1)


def check_cameras(c2w: Tensor) -> None:
    """Raises ValueError if the axes of the cameras (`[B, 4, 4]`) are not orthogonal. This happens with exactly three
    cameras, for which threestudio's data modules take cross products along the wrong dimension. Rays would then point
    in the wrong directions."""
    axes = c2w[:, :3, :3].float()
    if not torch.allclose(axes @ axes.mT, torch.eye(3, device=axes.device).expand_as(axes), atol=1e-3):
        raise ValueError(
            "the axes of the cameras are not orthogonal, because threestudio computes them wrongly for exactly three "
            "cameras: set data.batch_size, data.n_val_views and data.n_test_views to anything but 3"
        )


@dataclass(frozen=True)
class Parts:
    """threestudio's modules, and the shading that threestudio's systems request."""

    geometry: Any
    material: Any
    background: Any
    shading: dict[str, Any]


@dataclass(frozen=True)
class Rays:
    """The rays of B views.

    origins, directions: [B, H, W, 3]; directions have length 1.
    lights: the position of the light in each view, [B, 3].
    behind: colours that replace the background's, [B, H, W, C] or [B, 1, 1, C], or None.
    """

    origins: Tensor
    directions: Tensor
    lights: Tensor
    behind: Tensor | None = None

    def lights_like_directions(self) -> Tensor:
        """Returns the lights, repeated for each ray, as `[B, H, W, 3]`."""
        return self.lights[:, None, None].expand_as(self.directions)


@dataclass(frozen=True)
class Drawn:
    """The result of rendering N rays. `pixels` contains the outputs per ray, each [N, K], and `samples` contains the
    outputs per sample."""

    pixels: dict[str, Tensor]
    samples: dict[str, Tensor]
