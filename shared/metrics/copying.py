"""Detects outputs that repeat a reference picture instead of showing the subject in a new way.

An output counts as a copy when it matches the reference both as a whole (embedding cosine) and pixel for pixel
(zero-mean normalised cross-correlation, maximised over shifts, zooms and mirroring). One match is not enough, because a
faithful new view also has a high cosine, and two objects in front of the same plain wall also correlate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics.scores import cosine

GRID = 32  # pictures are compared at this size
MARGIN = 5  # the largest shift at which a copy is found, in cells of the grid (16% of the picture)
ZOOMS = (0.87, 1.0, 1.15)
PIXEL_FLOOR, EMBED_FLOOR = 0.85, 0.9  # limits never go below these
SAME = 0.995  # at this similarity or above, two references count as duplicates
PIXEL_DEFAULT, EMBED_DEFAULT = 0.9, 0.95  # used if there are fewer than two pictures to calibrate on


@dataclass(frozen=True)
class CopyLimits:
    """The similarities at which an output counts as a copy of a reference."""

    pixel: float
    embed: float
    calibrated_on: int  # number of pictures from which the limits were computed; 0 for the default limits


@dataclass(frozen=True)
class Copying:
    """The reference most similar to each output, both measures of similarity, and whether the output is a copy."""

    nearest: Tensor  # long [N]
    pixel: Tensor  # float64 [N]
    embed: Tensor  # float64 [N]
    copied: Tensor  # bool [N]


def aligned_similarity(pixels: Tensor, references: Tensor) -> Tensor:
    """Returns the best pixelwise correlation `[N, R]`, in [-1, 1], between outputs `[N, 3, H, W]` and references
    `[R, 3, H', W']`.

    The middle of each output is searched for in each reference by template matching (Lewis 1995), with each colour
    channel's mean subtracted. Mirrored and slightly zoomed versions are tried too. A picture scores 1 with itself,
    and a flat picture scores 0 with every picture.
    """
    side = GRID - 2 * MARGIN
    whole = _grid(references)
    best = torch.full((len(pixels), len(references)), -1.0, dtype=torch.float64)
    for zoom in ZOOMS:
        size = round(GRID * zoom)
        middle = _grid(pixels, size)
        start = (size - side) // 2
        patch = middle[:, :, start : start + side, start : start + side]
        for template in (patch, patch.flip(3)):
            best = torch.maximum(best, _match(template, whole))
    return best


def _match(template: Tensor, whole: Tensor) -> Tensor:
    """Returns the best normalised cross-correlation `[N, R]` between each template `[N, 3, s, s]` and each picture of
    `whole` `[R, 3, G, G]`, over all positions in the picture."""
    n, channels, s, _ = template.shape
    zero = template - template.mean((2, 3), keepdim=True)
    cross = F.conv2d(whole, zero)  # [R, N, p, p]; the template has zero mean, so the window's mean drops out
    mean = F.avg_pool2d(whole, s, 1)
    spread = ((F.avg_pool2d(whole**2, s, 1) - mean**2).clamp_min(0) * s * s).sum(1, keepdim=True)
    norm = spread.sqrt() * zero.square().sum((1, 2, 3)).sqrt().view(1, n, 1, 1)
    flat = 1e-3 * s * s * channels  # below this, a picture has no structure to compare
    score = torch.where(norm > flat, cross / norm.clamp_min(1e-12), torch.zeros_like(cross))
    return score.flatten(2).max(2).values.T


def _grid(pixels: Tensor, size: int = GRID) -> Tensor:
    """Crops pictures to the middle square and averages them down to `size`², in float64."""
    side = min(pixels.shape[2:])
    top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
    square = pixels[:, :, top : top + side, left : left + side].detach().double().cpu()
    mode = "area" if side >= size else "bilinear"
    return F.interpolate(square, size=(size, size), mode=mode)


def calibrate(
    references: Tensor, embeddings: Tensor, fresh: Tensor | None = None, fresh_embeddings: Tensor | None = None
) -> CopyLimits:
    """Sets the limits halfway between "two different pictures of the subject" and "the same picture".

    The former is the largest similarity between a reference and any picture known not to be a copy of it. Such pictures
    are the other references `[R, 3, H, W]` and any `fresh` pictures of the subject `[F, 3, H, W]` (new renders).
    Duplicates among the references are not counted.
    """
    others, vectors = references, embeddings
    if fresh is not None and fresh_embeddings is not None:
        others, vectors = torch.cat([references, fresh]), torch.cat([embeddings, fresh_embeddings])
    if len(others) < 2:
        return CopyLimits(PIXEL_DEFAULT, EMBED_DEFAULT, 0)
    pixel, embed = aligned_similarity(others, references), cosine(vectors, embeddings)
    for values in (pixel, embed):
        values[: len(references)].fill_diagonal_(-1)
    different = pixel < SAME
    half = [(float(v[different].max()) + 1) / 2 if different.any() else 1.0 for v in (pixel, embed)]
    return CopyLimits(max(PIXEL_FLOOR, min(half[0], 0.98)), max(EMBED_FLOOR, min(half[1], 0.99)), len(others))


def find_copies(
    pixels: Tensor, embeddings: Tensor, references: Tensor, reference_embeddings: Tensor, limits: CopyLimits
) -> Copying:
    """Finds the outputs `[N, 3, H, W]` that repeat one of the references `[R, 3, H, W]`.

    embeddings, reference_embeddings: one for each whole picture, `[N, D]` and `[R, D]`
    """
    pixel, embed = aligned_similarity(pixels, references), cosine(embeddings, reference_embeddings)
    nearest = pixel.argmax(1)
    index = torch.arange(len(pixels))
    both = (pixel >= limits.pixel) & (embed >= limits.embed)
    return Copying(nearest, pixel[index, nearest], embed[index, nearest], both.any(1))
