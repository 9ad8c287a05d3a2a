"""Writes pictures as PNG files with text chunks, and arranges them in grids and labelled contact sheets."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from shared.io.failures import of_the_machine
from shared.io.outputs import atomic_write
from shared.io.terminal import encodable

_PAPER = (255, 255, 255)
_INK = (30, 30, 30)
_GAP = 4  # pixels between the pictures of a sheet
_TILE = 128  # pixels; smaller pictures are enlarged to about this size on a contact sheet
_MOST_TILES = 10_000


def to_image(pixels: Tensor) -> Image.Image:
    """Converts `pixels` ([3, H, W] in [-1, 1], clamped) to an 8-bit image.

    Raises ValueError for any other shape, and for NaN or Inf.
    """
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise ValueError(f"a picture must have the shape [3, H, W]; this one has {list(pixels.shape)}")
    pixels = pixels.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError("a picture contains NaN or Inf: the model failed, or its precision is too low")
    levels = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))


def check_tiles(count: int, asked: str) -> None:
    """Raises ValueError if a sheet cannot show `count` pictures. `asked` names the options that request that many."""
    if count > _MOST_TILES:
        raise ValueError(f"{asked}: that makes {count:,} pictures, but a sheet can show at most {_MOST_TILES:,}")


def write_picture(
    picture: Tensor | Image.Image, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> Path:
    """Writes `picture` ([3, H, W] in [-1, 1], or an image) atomically as a PNG, with `metadata` as text chunks.

    Folders are created as needed, and an existing file is replaced. `read_metadata` reads the text back. Characters
    that UTF-8 cannot encode are stored as escapes. Raises ValueError if a key does not consist of 1 to 79 Latin-1
    characters.
    """
    path = Path(path)
    text = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        try:
            fits = 1 <= len(key.encode("latin-1")) <= 79
        except UnicodeEncodeError:
            fits = False
        if not fits:
            raise ValueError(f"{key!r} cannot be a PNG text key: use 1 to 79 Latin-1 characters")
        text.add_text(key, encodable(str(value)))
    image = to_image(picture) if isinstance(picture, Tensor) else picture
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
    return path


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the text chunks of a PNG by key. Raises ValueError if the file is not a readable PNG."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            assert isinstance(image, PngImagePlugin.PngImageFile)
            return {str(k): str(v) for k, v in image.text.items()}
    except Exception as error:
        if of_the_machine(error):
            raise
        raise ValueError(f"{path} is not a readable PNG: {error}") from None


def stills(pixels: Tensor, frames: int = 4) -> Tensor:
    """Turns clips ([N, 3, F, H, W]) into pictures; pictures ([N, 3, H, W]) are returned unchanged.

    Each clip becomes one picture that shows n of its frames side by side ([N, 3, H, n * W]). The n frames, at most
    `frames`, are evenly spaced from the first to the last.
    """
    if pixels.ndim == 4:
        return pixels
    chosen = torch.linspace(0, pixels.shape[2] - 1, min(frames, pixels.shape[2])).round().long()
    return torch.cat(pixels[:, :, chosen].unbind(2), dim=-1)


#: The maximum number of pixels in a sheet that grows with a number of pictures (a grid of 1024 pictures of 512x512).
MOST_SHEET = 2**28


class Grid:
    """A grid of pictures, which are added one by one."""

    def __init__(self, count: int, columns: int, size: tuple[int, int], gap: int = 0) -> None:
        """Prepares an empty grid for `count` pictures of `size` (height and width in pixels)."""
        self.columns, self.size, self.gap = columns, size, gap
        (height, width), rows = size, math.ceil(count / columns)
        self.sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), _PAPER)

    def add(self, index: int, picture: Tensor) -> None:
        """Puts a picture ([3, H, W] in [-1, 1]) into cell `index`, counted by rows."""
        down, right = divmod(index, self.columns)
        height, width = self.size
        self.sheet.paste(to_image(picture), (right * (width + self.gap), down * (height + self.gap)))


def check_sheet(option: str, count: int, size: Sequence[int]) -> None:
    """Raises ValueError, naming the option, if a sheet of `count` pictures of `size` (height and width) is too large."""
    pixels = count * math.prod(size)
    if pixels > MOST_SHEET:
        raise ValueError(
            f"{option}: {count:,} pictures of {size[1]}x{size[0]} pixels need a sheet of {pixels:,} pixels, above the limit of "
            f"{MOST_SHEET:,}; choose a lower --num, or leave out {option}"
        )


def grid(pixels: Tensor, columns: int | None = None, gap: int = 0) -> Image.Image:
    """Arranges pictures ([N, 3, H, W] in [-1, 1]) in a grid with `gap` pixels between them.

    If `columns` is None, there are sqrt(N) columns, rounded up.
    """
    if pixels.ndim != 4 or len(pixels) == 0:
        raise ValueError(f"a grid needs pictures of shape [N, 3, H, W], not {list(pixels.shape)}")
    columns = columns or math.ceil(math.sqrt(len(pixels)))
    if columns < 1:
        raise ValueError(f"a grid needs at least one column, not {columns}")
    out = Grid(len(pixels), min(columns, len(pixels)), (pixels.shape[-2], pixels.shape[-1]), gap)
    for i, picture in enumerate(pixels):
        out.add(i, picture)
    return out.sheet


def contact_sheet(rows: Mapping[str, Tensor], tile: int = _TILE, columns: int | None = None) -> Image.Image:
    """Draws rows of pictures (each row [N, 3, H, W] in [-1, 1]) with each row's label to its left.

    Pictures smaller than `tile` pixels are enlarged by an integer factor without smoothing, so that every pixel is
    visible; larger ones are unchanged. Rows may differ in length and picture size; rows longer than `columns` wrap.
    """
    if not rows or any(p.ndim != 4 or len(p) == 0 for p in rows.values()):
        raise ValueError("a contact sheet needs rows of pictures [N, 3, H, W], with at least one picture in each row")
    strips = [grid(_enlarged(p, tile), min(len(p), columns or len(p)), _GAP) for p in rows.values()]
    font, line = _font(), 18
    labels = [_wrapped(label, font, 190) for label in rows]
    left = _GAP * 3 + max((int(font.getlength(text)) for label in labels for text in label), default=0)
    heights = [max(s.height, line * len(lines)) for s, lines in zip(strips, labels, strict=True)]
    size = (left + max(s.width for s in strips) + _GAP, sum(heights) + _GAP * 3 * len(strips))
    sheet = Image.new("RGB", size, _PAPER)
    draw, top = ImageDraw.Draw(sheet), _GAP
    for strip, lines, height in zip(strips, labels, heights, strict=True):
        for i, text in enumerate(lines):
            draw.text((_GAP, top + (height - line * len(lines)) // 2 + i * line), text, _INK, font)
        sheet.paste(strip, (left, top))
        top += height + _GAP * 3
    return sheet


def _enlarged(pixels: Tensor, tile: int) -> Tensor:
    factor = max(1, round(tile / max(pixels.shape[-2:])))
    return pixels.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(14)
    except (ImportError, OSError):  # Pillow without FreeType
        return ImageFont.load_default()


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> Sequence[str]:
    if isinstance(font, ImageFont.ImageFont):
        text = text.encode("ascii", "replace").decode()
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
