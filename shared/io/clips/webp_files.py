"""Writes animated, lossless WebP."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from shared.io.clips.clip_metadata import DESCRIPTION


def durations(count: int, fps: Fraction, unit: int) -> list[int]:
    """Returns how long each frame is shown, in milliseconds, as multiples of `unit`. Rounding errors are carried over to the
    next frame, so that the clip keeps its length."""
    ends = [round(i * 1000 / fps / unit) * unit for i in range(count + 1)]
    return [b - a for a, b in pairwise(ends)]


def write_webp(path: Path | IO[bytes], levels: np.ndarray, fps: Fraction, comment: str) -> None:
    """Writes frames ([F, H, W, 3], 8-bit sRGB) losslessly, as an endlessly looping WebP.

    libwebp turns a clip in which nothing moves into a still picture without timing. To prevent this, the lowest bit of
    one corner pixel is flipped in the last frame of such a clip.
    """
    if len(levels) > 1 and (levels == levels[:1]).all():
        levels = levels.copy()
        levels[-1, -1, -1, 2] ^= 1
    exif = Image.Exif()
    exif[DESCRIPTION] = comment
    first, *others = (Image.fromarray(level) for level in levels)
    first.save(
        path,
        format="WEBP",
        save_all=True,
        append_images=others,
        duration=durations(len(levels), fps, 1),
        loop=0,
        lossless=True,
        quality=50,
        method=2,
        exif=exif.tobytes(),
    )
