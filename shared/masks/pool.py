"""Pools the masks of a clip to its latent grid."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pool_masks(masks: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Returns the share of each latent cell that is in the mask, [B, 1, f, h, w], for masks [B, 1, F, H, W] in [0, 1].

    In space, this is the mean over a cell's pixels, as for pictures. In time, f = F if frames are encoded one by one
    (AnimateDiff), or f = 1 + (F - 1) / r for a causal autoencoder that compresses time by a factor of r (4 in Wan, 8 in
    LTX). In the latter case, the first latent frame covers only the first frame, and each later latent frame is the
    mean of the next r frames. Raises ValueError for any other f.
    """
    if masks.ndim != 5 or masks.shape[1] != 1:
        raise ValueError(f"the masks of clips must have the shape [B, 1, F, H, W], not {list(masks.shape)}")
    frames, (latents, height, width) = masks.shape[2], grid
    if min(grid) < 1:
        raise ValueError(f"a latent grid must have at least one cell per side, not {list(grid)}")
    planes = F.interpolate(masks[:, 0].float(), (height, width), mode="area")  # frames as channels
    if latents == frames:
        return planes[:, None]
    ratio, rest = divmod(frames - 1, latents - 1) if latents > 1 else (0, 1)
    if rest or ratio < 1:
        possible = sorted({frames, *(1 + (frames - 1) // r for r in range(1, frames) if (frames - 1) % r == 0)} - {1})
        raise ValueError(
            f"masks of {frames} frame{'s' if frames > 1 else ''} cannot be pooled to {latents} latent "
            f"frame{'s' if latents > 1 else ''}, only to {possible or [1]}; there must be one latent frame per frame, or "
            "one for the first frame and one for each equally sized group of later frames"
        )
    groups = planes[:, 1:].unflatten(1, (latents - 1, ratio)).mean(2)
    return torch.cat([planes[:, :1], groups], 1)[:, None]
