"""Clips of a patch that moves with known flow over a textured background, and tracks built from displacements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics.clips.tracks import Tracks


def texture(size: tuple[int, int], seed: int) -> Tensor:
    """Returns smooth noise `[3, H, W]` in [-1, 1] with details about four pixels in size."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, size[0] // 4 + 1, size[1] // 4 + 1, generator=draw)
    return F.interpolate(coarse, size, mode="bicubic", align_corners=False)[0].clamp(0, 1) * 2 - 1


def moving_patch(
    step: tuple[int, int], frames: int = 5, size: tuple[int, int] = (64, 64), seed: int = 0, side: int = 20
) -> Tensor:
    """Returns a clip `[3, F, H, W]` of a patch that moves by `step` (right, down) pixels per frame.

    The patch is at the centre of the picture halfway through the clip.
    """
    ground, patch = texture(size, seed), texture((side, side), seed + 1).flip(0)
    clip = ground[:, None].repeat(1, frames, 1, 1)
    for i in range(frames):
        away = i - (frames - 1) / 2
        left, top = (round((length - side) / 2 + s * away) for length, s in zip(reversed(size), step, strict=True))
        clip[:, i, top : top + side, left : left + side] = patch
    return clip


def panned(step: int, frames: int = 5, side: int = 64, seed: int = 0) -> Tensor:
    """Returns a clip `[3, F, S, S]` that shifts left by `step` pixels per frame, as if the camera moved right."""
    wide = texture((side, side + step * frames), seed)
    return torch.stack([wide[:, :, i * step : i * step + side] for i in range(frames)], 1)


def tracks_of(steps: Tensor, visible: Tensor | None = None, side: int = 100) -> Tracks:
    """Builds N tracks over F frames from displacements `[N, F-1, 2]` in pixels."""
    points = torch.cat([torch.zeros(len(steps), 1, 2, dtype=torch.float64), steps.double().cumsum(1)], 1) + side / 2
    seen = torch.ones(points.shape[:2], dtype=torch.bool) if visible is None else visible
    return Tracks(points, seen, (side, side))


def along(*directions: Sequence[float], frames: int = 5) -> Tracks:
    """Builds one straight track for each direction, given as (right, down) in pixels per frame."""
    return tracks_of(torch.tensor(directions, dtype=torch.float64)[:, None].repeat(1, frames - 1, 1))
