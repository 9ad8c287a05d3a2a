"""Makes the subject smaller or larger in the frame, and mentions this in the caption, as Custom Diffusion does."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from shared.augment.base import Augmentation, integer, uniform
from shared.config import NotNegative, Positive
from shared.types import Example, Role


class RandomResize(Augmentation):
    """Resizes the picture by a factor from the range `scale`, and pads or crops it at a random position (arXiv
    2212.04488, section 3.2).

    For factors below `small_below`, one of `small_words` is added to the caption; for factors above 1, one of
    `large_words` is added. An empty caption stays empty. Padding is grey, and 0 in `valid`. The outermost `margin`
    pixels of a padded picture are also 0 in `valid`, because the autoencoder mixes them with the padding. Factors are
    drawn from one range, as in the paper; the paper's code uses two.
    """

    kind: Literal["random_resize"] = "random_resize"
    roles: tuple[Role, ...] = ("instance",)
    p: float = Field(default=1.0, ge=0, le=1)  # probability of resizing
    scale: tuple[Positive, Positive] = (0.4, 1.4)
    small_below: NotNegative = 0.6
    small_words: tuple[str, ...] = ("very small", "far away")
    large_words: tuple[str, ...] = ("zoomed in", "close up")
    margin: int = Field(default=8, ge=0, le=8192)  # pixels; limited to an eighth of the shorter resized side

    @model_validator(mode="after")
    def _ordered(self) -> RandomResize:
        low, high = self.scale
        if not 0.05 <= low <= high <= 8:
            raise ValueError(f"scale must be two factors from 0.05 to 8, smaller first, not {low}, {high}")
        return self

    @property
    def random(self) -> bool:
        return self.p > 0

    def apply(self, example: Example, generator: torch.Generator) -> Example:
        draw, factor = uniform(0, 1, generator), uniform(*self.scale, generator)
        if draw >= self.p:
            return example
        height, width = example.pixels.shape[-2:]
        inner = (max(1, round(height * factor)), max(1, round(width * factor)))
        top, left = (integer(abs(a - b) + 1, generator) for a, b in zip(inner, (height, width), strict=True))
        valid = torch.ones(1, height, width) if example.valid is None else example.valid
        pixels = resized(example.pixels, inner, "bicubic", -1)
        frame = (height, width, top, left)
        rim = 0 if inner[0] >= height else min(self.margin, min(inner) // 8)
        return example.with_(
            pixels=placed(pixels, *frame),
            masks={n: placed(resized(m, inner, "bilinear", 0), *frame) for n, m in example.masks.items()},
            valid=placed(_inside(resized(valid, inner, "bilinear", 0), rim), *frame),
            caption=self._caption(example.caption, factor, generator),
        )

    def _caption(self, caption: str, factor: float, generator: torch.Generator) -> str:
        words = self.small_words if factor < self.small_below else self.large_words if factor > 1 else ()
        if not words or not caption.strip():
            return caption
        return f"{caption}, {words[integer(len(words), generator)]}"


def resized(plane: Tensor, size: tuple[int, int], mode: str, low: float) -> Tensor:
    """Resizes a plane [C, H, W] to `size`, which is (height, width), with anti-aliasing. Values are clamped to [low, 1]."""
    return F.interpolate(plane[None], size=size, mode=mode, antialias=True, align_corners=False)[0].clamp(low, 1)


def placed(plane: Tensor, height: int, width: int, top: int, left: int) -> Tensor:
    """Puts a plane into a frame of zeros at (top, left). If the plane is larger than the frame, crops it at
    (top, left)."""
    h, w = plane.shape[-2:]
    if h >= height:
        return plane[:, top : top + height, left : left + width].contiguous()
    frame = plane.new_zeros(plane.shape[0], height, width)
    frame[:, top : top + h, left : left + w] = plane
    return frame


def _inside(valid: Tensor, rim: int) -> Tensor:
    if rim == 0:
        return valid
    out = torch.zeros_like(valid)
    out[:, rim:-rim, rim:-rim] = valid[:, rim:-rim, rim:-rim]
    return out
