"""Random tensors and pictures for the metric tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth_pictures(n: int, size: int = 64, seed: int = 0) -> Tensor:
    """Returns smooth random pictures `[n, 3, size, size]` in [-1, 1]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1) * 2 - 1


def embed(pixels: Tensor) -> Tensor:
    return F.normalize(F.adaptive_avg_pool2d(pixels, 4).flatten(1), dim=1)
