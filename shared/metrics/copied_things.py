"""Detects things that were cut out of a reference and pasted into a new picture.

As a whole, such a picture differs from the reference, so `shared.metrics.copying` misses it; only the thing in it is
the same, pixel for pixel. This module therefore cuts the thing out of the reference and searches for it in the picture,
which is likewise cropped around the thing that it shows. The score is the normalized cross-correlation under the
reference's mask, maximized over shifts, sizes and mirroring.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics.crops import aligned_crops

GRID = 40  # pictures are compared at this size
OUTPUT_MARGIN, REFERENCE_MARGIN = 1.6, 1.1  # the crops' side lengths, as multiples of the thing's
ZOOMS = tuple(0.8 * 1.045**i for i in range(11))  # from 0.8 to 1.24
INSIDE = 2  # exponent of the mask; it reduces the weight of the thing's border cells, which also show the background
FLAT = 1e-3  # below this spread, there is no structure to compare


def thing_similarity(pixels: Tensor, where: Tensor, references: Tensor, reference_where: Tensor) -> Tensor:
    """Returns the best correlation `[N, R]`, in [-1, 1], between the things in pictures `[N, 3, H, W]` and those in
    references `[R, 3, H', W']`.

    Args:
        where, reference_where: the probability that a cell shows the thing, `[N, h, w]` and `[R, h, w]`

    Each colour channel's mean over the thing is subtracted first, so that lighting does not matter.
    """
    cells = F.interpolate(aligned_crops(pixels, where, OUTPUT_MARGIN), (GRID, GRID), mode="area")
    shown = F.interpolate(reference_where[:, None], references.shape[2:], mode="bilinear").expand(-1, 3, -1, -1)
    things = aligned_crops(references, reference_where, REFERENCE_MARGIN)
    masks = aligned_crops(shown * 2 - 1, reference_where, REFERENCE_MARGIN)[:, :1].add(1).div(2).clamp(0, 1) ** INSIDE
    best = torch.full((len(pixels), len(references)), -1.0)
    for zoom in ZOOMS:
        side = min(GRID, round(GRID / OUTPUT_MARGIN * REFERENCE_MARGIN * zoom))
        template = F.interpolate(things, (side, side), mode="area")
        weights = F.interpolate(masks, (side, side), mode="area")
        for turned, mask in ((template, weights), (template.flip(3), weights.flip(3))):
            best = torch.maximum(best, _match(cells, turned, mask))
    return best.double()


def _match(cells: Tensor, template: Tensor, mask: Tensor) -> Tensor:
    """Returns the best correlation `[N, R]` between `cells` and each template `[R, 3, s, s]` under its mask
    `[R, 1, s, s]`, over all positions in `cells`."""
    weights = mask / mask.sum((2, 3), keepdim=True).clamp_min(1e-9)
    centred = template - (weights * template).sum((2, 3), keepdim=True)
    own = (weights * centred.square()).sum((1, 2, 3))
    cross = F.conv2d(cells, weights * centred)
    means = sum(F.conv2d(cells[:, c : c + 1], weights).square() for c in range(3))
    there = (F.conv2d(cells.square().sum(1, keepdim=True), weights) - means).clamp_min(0)
    return (cross / (there * own[None, :, None, None]).sqrt().clamp_min(FLAT)).flatten(2).amax(2)
