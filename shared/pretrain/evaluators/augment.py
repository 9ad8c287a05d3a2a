"""Augments rendered pictures for training the evaluators.

The shifts, blurs, tone changes and noise imitate the small errors of a VAE and a diffusion model, so that the
evaluators stay accurate on generated pictures. A batch is split into groups. All pictures in a group get the same shift
and the same blur, so that a whole group can be processed in one operation.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

GROUPS = 8


def from_bytes(pictures: np.ndarray) -> Tensor:
    """Converts pictures from uint8 `[B, H, W, 3]` to float `[B, 3, H, W]` in [0, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255.0


def to_bytes(pixels: Tensor) -> np.ndarray:
    """Converts pictures from float `[B, 3, H, W]` in [0, 1] to uint8 `[B, H, W, 3]`."""
    return (pixels.clamp(0, 1) * 255.0).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def augment(pixels: Tensor, generator: Generator, shift: int = 4) -> Tensor:
    """Degrades pictures (`[B, 3, H, W]` in [0, 1]). Shifts them by up to `shift` pixels, changes their tone and adds
    noise. On average, half of the groups are also blurred or reduced in resolution."""
    groups = []
    for group in pixels.chunk(GROUPS):
        group = _shift(group, generator, shift)
        kind = int(torch.randint(4, (), generator=generator))
        if kind == 0:
            group = blur(group, 0.4 + 0.8 * float(torch.rand((), generator=generator)))
        elif kind == 1:
            group = _resample(group, int(torch.randint(28, 56, (), generator=generator)))
        groups.append(group)
    return _noise(_tone(torch.cat(groups), generator), generator).clamp(0, 1)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Blurs pictures `[B, 3, H, W]` with a 5-tap Gaussian along each axis. `sigma` is in pixels."""
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)
    taps = (taps / taps.sum()).to(pixels)
    padded = F.pad(pixels, (2, 2, 2, 2), mode="replicate")
    rows = sum(taps[i] * padded[:, :, i : i + pixels.shape[2]] for i in range(5))
    assert isinstance(rows, Tensor)
    columns = sum(taps[i] * rows[..., i : i + pixels.shape[3]] for i in range(5))
    assert isinstance(columns, Tensor)
    return columns


def _shift(pixels: Tensor, generator: Generator, most: int) -> Tensor:
    if not most:
        return pixels
    x, y = (int(v) for v in torch.randint(0, 2 * most + 1, (2,), generator=generator))
    padded = F.pad(pixels, (most, most, most, most), mode="replicate")
    return padded[..., y : y + pixels.shape[2], x : x + pixels.shape[3]]


def _resample(pixels: Tensor, size: int) -> Tensor:
    small = F.interpolate(pixels, size=(size, size), mode="area")
    return F.interpolate(small, size=pixels.shape[2:], mode="bilinear", align_corners=False)


def _tone(pixels: Tensor, generator: Generator) -> Tensor:
    count = len(pixels)
    gain = 1 + 0.05 * torch.randn(count, 1, 1, 1, generator=generator)
    offset = 0.02 * torch.randn(count, 3, 1, 1, generator=generator)
    return (pixels - 0.5) * gain + 0.5 + offset


def _noise(pixels: Tensor, generator: Generator) -> Tensor:
    """Adds fine noise, and coarse noise with the 4-pixel grain of a 16×16 latent."""
    count, _, height, width = pixels.shape
    level = 0.04 * torch.rand(count, 1, 1, 1, generator=generator)
    fine = torch.randn(count, 3, height, width, generator=generator)
    coarse = torch.randn(count, 3, height // 4, width // 4, generator=generator)
    coarse = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=False)
    return pixels + level * (fine + coarse)
