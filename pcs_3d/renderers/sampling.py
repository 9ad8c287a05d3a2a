"""Chooses the points along rays at which a field is sampled."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def through_cube(origins: Tensor, directions: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Returns the distances (`[N]`) at which rays enter and leave the cube [-bound, bound]³. `origins` and `directions`
    are `[N, 3]`. If the entry is behind the camera, its distance is 0. If a ray misses the cube, the second distance is
    smaller than the first."""
    tiny = torch.full_like(directions, 1e-9).copysign(directions)
    inverse = 1 / torch.where(directions.abs() < 1e-9, tiny, directions)
    first, second = (-bound - origins) * inverse, (bound - origins) * inverse
    near = torch.minimum(first, second).amax(-1).clamp_min(0)
    return near, torch.maximum(first, second).amin(-1)


def stratified(near: Tensor, far: Tensor, count: int, generator: Generator | None) -> Tensor:
    """Divides each range from `near` to `far` (`[N]`) into `count` intervals, and returns their edges, `[N, count +
    1]`. With a generator, the inner edges are jittered by up to half an interval."""
    places = torch.arange(count + 1, device=near.device, dtype=near.dtype).expand(len(near), -1)
    if generator is not None:
        moved = torch.rand((len(near), count + 1), generator=generator, device=generator.device).to(places) - 0.5
        places = torch.cat([places[:, :1], places[:, 1:-1] + moved[:, 1:-1], places[:, -1:]], 1)
    return near[:, None] + places / count * (far - near)[:, None]


def by_importance(edges: Tensor, weights: Tensor, count: int, generator: Generator | None) -> Tensor:
    """Returns the edges (`[N, count + 1]`) of `count` intervals per ray that each contain the same share of the total
    weight. The edges are found by inverting the cumulative distribution (NeRF, https://arxiv.org/abs/2003.08934,
    section 5.2).

    A small weight is added everywhere, so that rays that hit nothing also get samples. nerfacc's version of this
    function needs CUDA.

    Args:
        edges: the edges of the given intervals, [N, S + 1]
        weights: the weights of the given intervals, [N, S]
    """
    weights = weights + 1e-3 + 0.05 * weights.mean(-1, keepdim=True)
    cumulated = torch.cat([torch.zeros_like(weights[:, :1]), weights.cumsum(-1)], 1)
    cumulated = cumulated / cumulated[:, -1:]
    asked = stratified(torch.zeros_like(edges[:, 0]), torch.ones_like(edges[:, 0]), count, generator).contiguous()
    upper = torch.searchsorted(cumulated, asked, right=True).clamp(1, edges.shape[1] - 1)
    low, high = cumulated.gather(1, upper - 1), cumulated.gather(1, upper)
    start, end = edges.gather(1, upper - 1), edges.gather(1, upper)
    share = ((asked - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return start + share * (end - start)
