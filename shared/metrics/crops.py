"""Crops pictures to the thing in them, so that things can be compared regardless of position, size and surroundings."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics.encoders import CropSettings, ImageEncoder

SURE = 0.15  # cells of the map below this do not count as part of the thing
Jitter = tuple[float, float, float]
JITTERS: tuple[Jitter, ...] = (
    (0.0, 0.0, 1.0),
    (0.12, 0.0, 1.08),
    (-0.12, 0.0, 0.93),
    (0.0, 0.12, 0.93),
    (0.0, -0.12, 1.08),
)
LEAST = 0.15  # smallest half side of a crop, in half-pictures; anything smaller is a speck


def placements(where: Tensor) -> Tensor:
    """Locates the things in N pictures. Returns `[N, 3]`: x (right) and y (down) from the picture's centre, and half
    the thing's larger side, in units of half the picture.

    Args:
        where: the probability that a cell shows the thing, `[N, h, w]`; a mask works too

    The size assumes a uniformly filled box with the same spread (half a side = √3 standard deviations), so a few stray
    cells hardly change it. For an empty map, the result is the whole picture.
    """
    heat = (where * (where > SURE)).double()
    total = heat.sum((1, 2)).clamp_min(1e-9)
    middles, spreads = [], []
    for along in (1, 2):  # sum over rows -> columns, x; sum over columns -> rows, y
        weights = heat.sum(along)
        count = weights.shape[1]
        at = (torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 - 1
        middle = (weights * at).sum(1) / total
        middles.append(middle)
        spreads.append((weights * (at - middle[:, None]).square()).sum(1) / total)
    half = math.sqrt(3) * torch.maximum(*spreads).sqrt()
    empty = heat.sum((1, 2)) <= 0
    half = torch.where(empty, torch.ones_like(half), half)
    return torch.stack([*middles, half], 1)


def aligned_crops(
    pixels: Tensor, where: Tensor, margin: float, cells: int | None = None, jitter: Jitter = (0.0, 0.0, 1.0)
) -> Tensor:
    """Enlarges the square around each thing to the size of the picture. Takes and returns `[N, 3, H, W]`.

    Args:
        where: `[N, h, w]`, as for `placements`
        margin: side of the square as a multiple of the thing's side; at 1, the square touches the thing
        cells: the number of cells per side of the grid that the crop is reduced to, so that things that were large in
            their picture show no more detail than small ones. None keeps all detail
        jitter: how far the square is moved right and down, in half sides of the thing, and how much it is enlarged
    """
    right, down, larger = jitter
    at = placements(where).to(pixels)
    x, y = at[:, 0] + right * at[:, 2], at[:, 1] + down * at[:, 2]
    half = (margin * larger * at[:, 2]).clamp_min(LEAST)
    zero = torch.zeros_like(half)
    maps = torch.stack([torch.stack([half, zero, x], 1), torch.stack([zero, half, y], 1)], 1)
    height, width = pixels.shape[2:]
    grid = F.affine_grid(maps, [len(pixels), 3, height, width], align_corners=False)
    crops = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    if cells is None:
        return crops
    coarse = F.interpolate(crops, (cells, cells), mode="area")
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)


def crop_embeddings(encoder: ImageEncoder, pixels: Tensor, where: Tensor, how: CropSettings) -> Tensor:
    """Returns unit embeddings `[N, D]` of crops aligned on the thing.

    Each embedding is the mean over crops shifted and scaled by `JITTERS`. The map locates a thing only to within a
    fraction of a cell, and that error must not look like a change of pose.
    """
    every = [encoder.images(aligned_crops(pixels, where, how.margin, how.cells, jitter)) for jitter in JITTERS]
    return F.normalize(torch.stack(every).sum(0), dim=1)
