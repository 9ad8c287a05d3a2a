"""Computes the exact optical flow of a clip from the positions of the thing's visible points in consecutive frames."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.toybox.splat import DISTANCE, Hits, Instances, projected, turned
from shared.toybox.surfaces import HitImage, halved

# A point is hidden if, in the next frame, it lies more than this many radii behind the surface that its pixel shows.
_BEHIND = 0.06
_GRAZING = 0.2  # the cosine of the viewing angle below which a surface counts as seen edge-on


@dataclass(frozen=True)
class Flow:
    """The optical flow of a clip.

    moved: [F-1, H, W, 2], the shift from one frame to the next, to the right and down, in pixels. Where the flow is not
        known, this is the shift of the surface that covers most of the pixel.
    known: bool [F-1, H, W], whether the pixel shows a single surface that is also visible in the next frame
    """

    moved: Tensor
    known: Tensor


@torch.no_grad()
def flow(things: Instances, hits: Hits, pan: Tensor, size: int) -> Flow:
    """Computes the flow for F frames of size×size pixels. Each frame shows one thing.

    pan: [F], the shift of the background as in `Scene.pan`
    """
    frames, fine = len(pan), 2 * size
    canvas = HitImage(hits, frames, fine)
    after = hits.who.add(1).clamp(max=frames - 1)
    here, there = (turned(things.axes, who, hits.position) for who in (hits.who, after))
    u, v, _ = projected(here, things.place[hits.who], fine)
    next_u, next_v, depth = projected(there, things.place[after], fine)
    inside = (next_u >= 0) & (next_u <= fine - 1) & (next_v >= 0) & (next_v <= fine - 1)
    cell = next_v.round().clamp(0, fine - 1) * fine + next_u.round().clamp(0, fine - 1)
    nearest = canvas.depth().flatten()[after * fine * fine + cell.long()]
    sight = torch.nn.functional.normalize(there.new_tensor([0.0, 0.0, DISTANCE]) - there, dim=1)
    facing = (turned(things.axes, after, hits.normal) * sight).sum(1) > _GRAZING
    seen = inside & facing & (depth <= nearest + _BEHIND)
    cover = halved(canvas.scatter(torch.ones_like(depth)[:, None]))
    moved = halved(canvas.scatter(torch.stack([next_u - u, next_v - v], 1) / 2)) / cover.clamp_min(1e-6)
    whole = halved(canvas.scatter(seen.float()[:, None])) == 1
    by = (pan[1:] - pan[:-1]) * size
    slid = torch.stack([by, torch.zeros_like(by)], 1)[:, None, None]
    moved = torch.where(cover[:-1, 0, :, :, None] >= 0.5, moved[:-1].permute(0, 2, 3, 1), slid)
    return Flow(moved, whole[:-1, 0] | _open(cover[:, 0], by))


def _open(cover: Tensor, by: Tensor) -> Tensor:
    """Returns whether each pixel shows a point of the background that is also visible in the next frame, bool
    [F-1, H, W]. From frame to frame, the background moves `by` ([F-1]) pixels to the right."""
    size = cover.shape[-1]
    at = torch.arange(size, device=cover.device) + by[:, None]
    inside = (at >= 0) & (at <= size - 1)
    low = at.floor().clamp(0, size - 1).long()
    columns = torch.stack([low, (low + 1).clamp(max=size - 1)])[:, :, None].expand(-1, -1, size, -1)
    clear = (cover[1:].expand(2, -1, -1, -1).gather(3, columns) == 0).all(0)
    return (cover[:-1] == 0) & inside[:, None] & clear
