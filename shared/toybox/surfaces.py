"""Turns visible surfaces into pictures. The hits' values are written into subpixels, and the subpixels of each pixel
are then averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.toybox.splat import DISTANCE, Hits

FAR = 2 * DISTANCE  # the depth of the background
SPACING = 0.02  # distance between neighbouring points of a surface, for pictures of 64 pixels


@dataclass(frozen=True)
class HitImage:
    """The hits of B = `count` scenes, on pictures of S×S subpixels, where S is `side`."""

    hits: Hits
    count: int
    side: int

    def scatter(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Writes the hits' values [M, D] into pictures [B, D, S, S]."""
        flat = values.new_full((self.count * self.side * self.side, values.shape[1]), fill)
        flat[self.hits.at] = values
        return flat.view(self.count, self.side, self.side, -1).permute(0, 3, 1, 2)

    def depth(self) -> Tensor:
        """Returns the depth [B, 1, S, S], which is `FAR` in the background."""
        return self.scatter(self.hits.depth[:, None], FAR)


def halved(picture: Tensor) -> Tensor:
    """Averages blocks of 2×2 subpixels of a picture [B, C, S, S]. Returns [B, C, S / 2, S / 2]."""
    rows = picture[..., ::2, :] + picture[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) * 0.25


def near_depth(depth: Tensor, mask: Tensor) -> Tensor:
    """Averages the depth [B, 1, S, S] of things within each pixel. Returns [B, 1, S / 2, S / 2]. Pixels without a thing
    get the depth `FAR`."""
    cover = halved(mask)
    return torch.where(cover > 0, halved(depth * mask) / cover.clamp_min(1e-6), torch.full_like(cover, FAR))
