"""Writes animated GIFs with one palette for the whole clip, so that colours do not flicker."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from shared.io.clips.webp_files import durations

_COLORS = 256
_SIDE = 360  # the palette is computed from _SIDE² pixels, sampled from the whole clip
_UNIT = 10  # milliseconds; the unit of a GIF's delays
_FASTEST = 50  # frames per second; browsers play anything faster at only 10


def write_gif(path: Path, levels: np.ndarray, fps: Fraction, comment: str) -> None:
    """Writes frames ([F, H, W, 3], 8-bit sRGB) as an endlessly looping GIF.

    A clip with at most 256 colours is stored exactly. Other clips get an adaptive palette of 256 colours and ordered
    dithering, because the pattern of error diffusion would crawl even where the picture does not change. Raises
    ValueError above 50 frames per second.
    """
    if fps > _FASTEST:
        raise ValueError(f"{float(fps):g} frames per second exceeds a GIF's limit of {_FASTEST}: write WebP or mp4")
    frames = _exact(levels) or _patterned(levels)
    frames[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=durations(len(frames), fps, _UNIT),
        loop=0,
        comment=comment.encode("ascii"),
        optimize=False,
        disposal=1,
    )


def _exact(levels: np.ndarray) -> list[Image.Image]:
    """Returns the frames with a palette of all the clip's colours. Returns [] if there are more than 256 colours."""
    packed = (levels.astype(np.uint32) * np.array([1 << 16, 1 << 8, 1], np.uint32)).sum(-1, dtype=np.uint32)
    colors = np.unique(packed)
    if len(colors) > _COLORS:
        return []
    palette = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], -1).astype(np.uint8)
    places = np.searchsorted(colors, packed).astype(np.uint8)
    return [_indexed(place, palette) for place in places]


def _indexed(places: np.ndarray, palette: np.ndarray) -> Image.Image:
    image = Image.fromarray(places)
    image.putpalette(palette.tobytes())
    return image


def _patterned(levels: np.ndarray) -> list[Image.Image]:
    """Returns the frames dithered to an adaptive palette of 256 colours.

    The dithering amplitude is roughly the distance between neighbouring palette colours.
    """
    pixels = levels.reshape(-1, 3)
    drawn = pixels[np.random.default_rng(0).integers(0, len(pixels), _SIDE * _SIDE)].reshape(_SIDE, _SIDE, 3)
    palette = Image.fromarray(drawn).quantize(_COLORS, method=Image.Quantize.MEDIANCUT)
    error = np.asarray(palette.convert("RGB")).astype(np.float32) - drawn
    rows, columns = -(-levels.shape[1] // 8), -(-levels.shape[2] // 8)
    pattern = np.tile(_bayer(3), (rows, columns))[: levels.shape[1], : levels.shape[2], None]
    pattern = pattern * 2 * np.sqrt((error**2).mean())
    out = []
    for level in levels:
        shifted = np.clip(level + pattern, 0, 255).round().astype(np.uint8)
        out.append(Image.fromarray(shifted).quantize(palette=palette, dither=Image.Dither.NONE))
    return out


def _bayer(order: int) -> np.ndarray:
    """Returns the ordered-dither matrix with 2**order rows and values evenly spread from -1/2 to 1/2 (Bayer 1973)."""
    matrix = np.zeros((1, 1))
    for _ in range(order):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return (matrix + 0.5) / matrix.size - 0.5
