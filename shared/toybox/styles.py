"""Defines the drawing styles, which are functions of a finished picture and its per-pixel ground truth.

They work on pictures of S×S subpixels, where S is twice the final size. `render` averages the subpixels afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Sheet:
    """A style's inputs for b pictures.

    picture: [b, 3, S, S] in [0, 1]
    mask, depth: [b, 1, S, S]
    normal: normals in camera space [b, 3, S, S]
    numbers: random numbers [b, 48] in [0, 1]
    """

    picture: Tensor
    mask: Tensor
    depth: Tensor
    normal: Tensor
    numbers: Tensor


def gray(picture: Tensor) -> Tensor:
    """Returns the brightness of pictures, [b, 1, S, S]."""
    return (picture * picture.new_tensor([0.3, 0.59, 0.11])[:, None, None]).sum(1, keepdim=True)


def blur(picture: Tensor, radius: int) -> Tensor:
    """Applies a triangle filter, which is a box filter applied twice."""
    size, width = picture.shape[-1], 2 * radius + 1
    for _ in range(2):
        padded = F.pad(picture, (radius,) * 4, mode="replicate")
        # Summing rows and then columns is far cheaper here than a pooling layer.
        across = sum((padded[..., k : k + size] for k in range(1, width)), padded[..., :size])
        picture = sum((across[..., k : k + size, :] for k in range(1, width)), across[..., :size, :]) / width**2
    return picture


def _slope(values: Tensor) -> Tensor:
    """Returns the largest difference, in any channel, between two opposite neighbours of each pixel, [b, 1, S, S]."""
    padded = F.pad(values, (1, 1, 1, 1), mode="replicate")
    across = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]).abs()
    down = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]).abs()
    return torch.maximum(across, down).amax(1, keepdim=True)


def outlines(s: Sheet) -> Tensor:
    """Returns the lines that an artist would draw (silhouettes, creases and borders between colours), [b, 1, S, S] in
    [0, 1]."""
    shape = (_slope(s.depth.clamp(max=7)) * 1.2 - 0.15).clamp(0, 1)
    crease = (_slope(s.normal) - 0.55).clamp(0, 1) * s.mask
    color = (_slope(blur(s.picture, 1)) * 3 - 0.42).clamp(0, 1)
    return torch.maximum(torch.maximum(shape, crease), color)


def _grid(s: Sheet) -> tuple[Tensor, Tensor]:
    """Returns pixel coordinates x, y [1, 1, S, S] in 64ths of the picture."""
    size = s.picture.shape[-1]
    step = torch.arange(size, device=s.picture.device) * (64 / size)
    y, x = torch.meshgrid(step, step, indexing="ij")
    return x[None, None], y[None, None]


def _fine(s: Sheet, pixels: float) -> int:
    """Converts a length from 64ths of the picture to pixels of the sheet (at least 1)."""
    return max(1, round(pixels * s.picture.shape[-1] / 64))


def _tint(s: Sheet, color: tuple[float, float, float]) -> Tensor:
    return s.picture.new_tensor(color)[None, :, None, None]


def pencil_sketch(s: Sheet) -> Tensor:
    """Draws grey lines and hatching on paper, with a hint of colour."""
    x, y = _grid(s)
    light = gray(blur(s.picture, 1))
    line = (outlines(s) * 1.3).clamp(0, 1)
    hatch = ((x + y) * 2.0).sin() * 0.5 + 0.5
    shade = ((0.62 - light) * 1.5).clamp(0, 0.75) * (0.45 + 0.55 * hatch)
    paper = 0.96 - 0.85 * torch.maximum(line * 0.95, shade)
    return (paper + 0.22 * (s.picture - gray(s.picture)) * (0.5 + 0.5 * s.mask)).clamp(0, 1)


def watercolor(s: Sheet) -> Tensor:
    """Paints pale washes that run into each other and have dark edges, on a white sheet whose border stays bare."""
    x, y = _grid(s)
    soft = blur(s.picture, _fine(s, 0.8))
    wobble = 0.5 * (x * 0.31 + 5 * s.numbers[:, 30, None, None, None]).sin() * (y * 0.27 + 3).sin()
    wash = 1 - (1 - soft) * (0.78 + 0.2 * wobble)
    rim = (_slope(blur(s.picture, 1)) * 1.1).clamp(0, 0.3)
    wash = wash * (1 - rim)
    away = torch.minimum(torch.minimum(x, 63.5 - x), torch.minimum(y, 63.5 - y))
    ragged = away - 4.5 - 1.5 * (x * 0.5 + 7 * s.numbers[:, 31, None, None, None]).sin() * (y * 0.43).cos()
    return 1 + (wash - 1) * (ragged / 2 + 0.5).clamp(0, 1)


def pixel_art(s: Sheet) -> Tensor:
    """Draws large square pixels with few brightness levels."""
    size = s.picture.shape[-1]
    block = _fine(s, 3)
    count = -(-size // block)
    small = F.interpolate(s.picture, (count, count), mode="area")
    small = (small * 5).round() / 5
    return F.interpolate(small, scale_factor=block, mode="nearest")[..., :size, :size]


def cartoon(s: Sheet) -> Tensor:
    """Draws flat, saturated colours with thick black outlines."""
    soft = blur(s.picture, _fine(s, 0.5))
    light = gray(soft)
    flat = (light * 3 + 0.35).floor().div(3).clamp(0.14, 1)
    color = (light + (soft - light) * 1.5) / light.clamp_min(0.05) * flat
    color = color.clamp(0, 1) * 0.88 + 0.1
    edge = F.max_pool2d((_slope(s.depth.clamp(max=7)) * 2 - 0.3).clamp(0, 1), 3, 1, 1)
    inner = ((_slope(blur(s.picture, 1)) * 2.4 - 0.6) * s.mask).clamp(0, 0.8)
    return color * (1 - torch.maximum(edge, inner))


def neon(s: Sheet) -> Tensor:
    """Draws glowing lines in bright colours on a dark background."""
    line = outlines(s).clamp(0, 1)
    light = gray(s.picture).clamp_min(0.06)
    hue = (s.picture / light * 0.5 + (s.picture - light) * 1.6).clamp(0.05, 1)
    hue = blur(hue, 2)
    hue = hue / hue.amax(1, keepdim=True).clamp_min(0.1)
    glow = blur(line, _fine(s, 1.6)) * 1.1
    base = s.picture * 0.1 + _tint(s, (0.03, 0.0, 0.07))
    return (base + hue * (line * 0.75 + glow * 0.7) + 0.25 * line * s.mask).clamp(0, 1)


def blueprint(s: Sheet) -> Tensor:
    """Draws white lines and a grid on blue paper."""
    x, y = _grid(s)
    grid = ((x % 8 < 0.6) | (y % 8 < 0.6)).float() * 0.16
    line = outlines(s)
    blue = _tint(s, (0.08, 0.24, 0.62)) * (0.85 + 0.35 * gray(s.picture))
    return (blue + grid + (1 - blue) * line * 0.9).clamp(0, 1)


def halftone(s: Sheet) -> Tensor:
    """Prints dots of varying size in dark inks on a cream sheet."""
    x, y = _grid(s)
    a, b = (x + y) / 3.0 * 3.1416, (x - y) / 3.0 * 3.1416
    screen = a.cos() * b.cos() * 0.5 + 0.5
    ink = ((1 - gray(s.picture)) * 1.05 - screen) * 5 + 0.5
    paint = blur(s.picture, _fine(s, 0.7)) * 0.62
    return _tint(s, (0.97, 0.92, 0.8)) * (1 - ink.clamp(0, 1)) + paint * ink.clamp(0, 1)


def _cells(s: Sheet, pitch: float) -> tuple[Tensor, Tensor]:
    """Divides the picture into irregular cells. Returns, for each pixel, the colour at the centre of its cell, and how
    much nearer this centre is than the second-nearest centre, in 64ths of the picture."""
    b, _, size, _ = s.picture.shape
    x, y = _grid(s)
    best = torch.full((b, 1, size, size), 1e9, device=s.picture.device)
    second, bx, by = best.clone(), best.clone(), best.clone()
    gx, gy = (x / pitch).floor(), (y / pitch).floor()
    for dx in (-1, 0, 1):
        for dy in (-1, 0, 1):
            cx, cy = gx + dx, gy + dy
            px = (cx + 0.5 + 0.36 * (cx * 12.9 + cy * 7.3).sin()) * pitch
            py = (cy + 0.5 + 0.36 * (cx * 4.7 + cy * 15.1).cos()) * pitch
            far = ((x - px) ** 2 + (y - py) ** 2).sqrt().expand_as(best)
            closer = far < best
            second = torch.where(closer, best, torch.minimum(second, far))
            bx, by = torch.where(closer, px.expand_as(bx), bx), torch.where(closer, py.expand_as(by), by)
            best = torch.where(closer, far, best)
    where = torch.cat([bx, by], 1).permute(0, 2, 3, 1) / 32 - 1
    color = F.grid_sample(blur(s.picture, _fine(s, 1)), where, align_corners=False, padding_mode="border")
    return color, second - best


def stained_glass(s: Sheet) -> Tensor:
    """Draws bright, irregular panes between strips of dark lead."""
    color, border = _cells(s, 6.0)
    color = color + s.mask * 0.65 * (s.picture - color)
    light = gray(color)
    color = (light + (color - light) * 1.7).clamp(0, 1) * 0.85 + 0.12
    lead = torch.maximum((1.3 - border).clamp(0, 1), (_slope(s.mask) > 0.5).float())
    return color * (1 - lead) + 0.04 * lead


def _ramp(values: Tensor, colors: list[tuple[float, float, float]]) -> Tensor:
    """Maps values [b, 1, S, S] in [0, 1] to the colours of a ramp. Returns [b, 3, S, S]."""
    table = values.new_tensor(colors)
    at = values[:, 0].clamp(0, 1) * (len(colors) - 1)
    low = at.floor().long().clamp(max=len(colors) - 2)
    part = (at - low)[..., None]
    return (table[low] * (1 - part) + table[low + 1] * part).permute(0, 3, 1, 2)


def thermal(s: Sheet) -> Tensor:
    """Draws a thermal image in which things glow and the background is cold."""
    heat = 0.12 + 0.25 * gray(s.picture) + s.mask * (0.28 + 0.42 * s.normal[:, 2:].clamp(0, 1))
    ramp = [(0.02, 0.0, 0.2), (0.35, 0.0, 0.6), (0.85, 0.15, 0.35), (1.0, 0.6, 0.0), (1.0, 1.0, 0.6)]
    return _ramp(blur(heat, 1), ramp)


def duotone(s: Sheet) -> Tensor:
    """Prints in two inks, deep violet and orange."""
    return _ramp((gray(s.picture) - 0.1) * 1.25, [(0.2, 0.02, 0.36), (0.93, 0.25, 0.35), (1.0, 0.85, 0.4)])


def mosaic(s: Sheet) -> Tensor:
    """Lays small square stones in pale mortar."""
    size = s.picture.shape[-1]
    pitch = _fine(s, 3.5)
    count = -(-size // pitch)
    small = F.interpolate(s.picture, (count, count), mode="area")
    jitter = 0.9 + 0.2 * (torch.arange(count * count, device=small.device) * 2.399).sin().view(1, 1, count, count)
    tiles = F.interpolate(small * jitter, scale_factor=pitch, mode="nearest")[..., :size, :size]
    step = torch.arange(size, device=small.device) % pitch
    gap = ((step[:, None] < pitch // 4) | (step[None] < pitch // 4)).float()
    return tiles * (1 - gap) + 0.82 * gap


def woodcut(s: Sheet) -> Tensor:
    """Prints black on bare paper, in horizontal strokes that follow the form."""
    x, y = _grid(s)
    light = gray(blur(s.picture, 1))
    stroke = ((y + 2.5 * s.normal[:, 1:2] + 0.4 * (x * 0.5).sin()) * 1.9).sin() * 0.3
    ink = ((0.42 + stroke - light) * 8 + 0.5).clamp(0, 1)
    ink = torch.maximum(ink, outlines(s))
    return _tint(s, (0.93, 0.86, 0.72)) * (1 - ink) + 0.05 * ink


def crosshatch(s: Sheet) -> Tensor:
    """Draws one, two or three layers of strokes in blue ink."""
    x, y = _grid(s)
    light = gray(blur(s.picture, 1))
    ink = outlines(s)
    for level, phase in ((0.8, x + y), (0.55, x - y), (0.32, x * 1.4)):
        stroke = ((phase * 1.5).sin() * 2 - 0.5).clamp(0, 1)
        ink = torch.maximum(ink, stroke * ((level - light) * 6).clamp(0, 1))
    return _tint(s, (0.98, 0.97, 0.93)) * (1 - ink) + _tint(s, (0.08, 0.1, 0.42)) * ink


DRAWERS: dict[str, Callable[[Sheet], Tensor]] = {
    "pencil sketch": pencil_sketch,
    "watercolor painting": watercolor,
    "pixel art": pixel_art,
    "cartoon": cartoon,
    "neon": neon,
    "blueprint": blueprint,
    "halftone": halftone,
    "stained glass": stained_glass,
    "thermal": thermal,
    "duotone": duotone,
    "mosaic": mosaic,
    "woodcut": woodcut,
    "crosshatch": crosshatch,
}


def draw(name: str, sheet: Sheet) -> Tensor:
    """Draws a sheet's pictures in a style. Returns [b, 3, S, S]. Raises ValueError if the style is unknown."""
    if name not in DRAWERS:
        raise ValueError(f"the toybox has no style {name!r}; choose from photo, {', '.join(DRAWERS)}")
    return DRAWERS[name](sheet).clamp(0, 1)
