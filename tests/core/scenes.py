"""A test picture, and helpers that write it in any format and read it back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from shared.io.decode import read_picture


def scene(width: int = 48, height: int = 32) -> np.ndarray:
    """Returns a uint8 picture `[H, W, 3]` with no symmetry."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], -1).astype(np.uint8)
    rgb[:8, :8] = (250, 10, 10)
    return rgb


def levels(path: Path) -> np.ndarray:
    """Reads a file with `read_picture` and returns its pixels `[H, W, 3]`, scaled to the range 0 to 255."""
    return (read_picture(path).pixels.permute(1, 2, 0).numpy() + 1) * 127.5


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return path
