"""Makes masks larger, smaller or softer."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from shared.masks.base import MaskPart


class Grow(MaskPart):
    """Dilates the mask with a disc of radius `by`, or erodes it if `by` is negative, then blurs it with sigma `soften`.

    Both settings are in pixels of the training resolution.
    """

    taxonomy: ClassVar[str] = "grown masks"
    kind: Literal["grow"] = "grow"
    by: int = Field(default=0, ge=-256, le=256)
    soften: float = Field(default=0.0, ge=0, le=256)

    def change(self, mask: Tensor) -> Tensor:
        grown = dilate(mask, self.by) if self.by >= 0 else 1 - dilate(1 - mask, -self.by)
        return blur(grown, self.soften)


def dilate(mask: Tensor, radius: int) -> Tensor:
    """Replaces each pixel of a mask [1, H, W] with the maximum within `radius` pixels."""
    height = mask.shape[-2]
    out = mask.clone()
    for dy in range(-min(radius, height - 1), min(radius, height - 1) + 1):
        half = math.isqrt(radius * radius - dy * dy)
        wide = F.max_pool1d(mask[0], 2 * half + 1, stride=1, padding=half) if half else mask[0]
        to, source = slice(max(dy, 0), height + min(dy, 0)), slice(max(-dy, 0), height + min(-dy, 0))
        out[0, to] = torch.maximum(out[0, to], wide[source])
    return out


def blur(mask: Tensor, sigma: float) -> Tensor:
    """Blurs a mask [1, H, W] with a Gaussian of `sigma` pixels. Edge values are replicated outside the mask."""
    if sigma == 0:
        return mask
    half = max(1, math.ceil(3 * sigma))
    x = torch.arange(-half, half + 1, dtype=mask.dtype)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(mask[None], (half, half, half, half), mode="replicate")
    across = F.conv2d(padded, kernel.view(1, 1, 1, -1))
    return F.conv2d(across, kernel.view(1, 1, -1, 1))[0].clamp(0, 1)
