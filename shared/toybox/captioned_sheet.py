"""Draws contact sheets, which show many pictures in a grid, optionally with a caption below each picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def sheet(pixels: Tensor, columns: int, captions: Sequence[str] | None = None, scale: int = 2) -> Image.Image:
    """Arranges N pictures ([N, 3, H, W] in [0, 1], or uint8) in a grid with `columns` columns. Each picture is enlarged
    `scale` times."""
    n, _, height, width = pixels.shape
    if captions is not None and len(captions) != n:
        raise ValueError(f"each picture needs one caption, but there are {len(captions)} captions for {n} pictures")
    if pixels.dtype != torch.uint8:
        pixels = (pixels.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    tiles = pixels.permute(0, 2, 3, 1).cpu().numpy().repeat(scale, 1).repeat(scale, 2)
    high, wide, gap = height * scale, width * scale, 2
    letters = max(8, wide // 6)
    lines = [textwrap.wrap(text, letters) for text in captions] if captions is not None else []
    strip = 12 * max((len(texts) for texts in lines), default=0) + (4 if lines else 0)
    rows = -(-n // columns)
    page = Image.new("RGB", (columns * (wide + gap) + gap, rows * (high + strip + gap) + gap), "white")
    pen = ImageDraw.Draw(page)
    for index, tile in enumerate(tiles):
        x, y = gap + index % columns * (wide + gap), gap + index // columns * (high + strip + gap)
        page.paste(Image.fromarray(np.ascontiguousarray(tile)), (x, y))
        if lines:
            pen.multiline_text((x + 1, y + high + 1), "\n".join(lines[index]), fill="black", spacing=1)
    return page
