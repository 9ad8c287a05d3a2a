"""Defines an object made of coloured ellipsoids. Its views are exact, because ray intersections have a closed form."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras, turntable

#: The centre, semi-axes and colour of each part: a body, a head at the front (+x), a tail, and a hat on one side.
PARTS = (
    ((0.0, 0.0, -0.15), (0.55, 0.42, 0.38), (0.85, 0.2, 0.2)),
    ((0.48, 0.0, 0.3), (0.27, 0.27, 0.27), (0.2, 0.35, 0.9)),
    ((-0.6, 0.0, 0.05), (0.22, 0.16, 0.2), (0.15, 0.7, 0.3)),
    ((0.0, 0.38, 0.2), (0.2, 0.2, 0.3), (0.95, 0.8, 0.15)),
)
_OVER = 3  # rays per pixel along each image axis


@dataclass(frozen=True)
class TrueViews:
    """The exact views of the object.

    Args:
        pixels: colours on a white background, `[B, 3, S, S]` in [0, 1]
        coverage: the share of each pixel that the object covers, `[B, 1, S, S]`
    """

    pixels: Tensor
    coverage: Tensor


def true_views(cameras: Cameras, side: int) -> TrueViews:
    """Renders the object as the cameras see it, without shading."""
    origins, directions = cameras.rays(side * _OVER, side * _OVER)
    nearest = torch.full(directions.shape[:-1], torch.inf)
    colors = torch.ones_like(directions)
    for centre, axes, color in PARTS:
        scale = 1 / torch.tensor(axes)
        start, along = (origins - torch.tensor(centre)) * scale, directions * scale
        a, b, c = along.square().sum(-1), (start * along).sum(-1), start.square().sum(-1) - 1
        root = b.square() - a * c
        distance = torch.where(root > 0, (-b - root.clamp_min(0).sqrt()) / a, torch.inf)
        closer = distance < nearest
        colors = torch.where(closer[..., None], torch.tensor(color), colors)
        nearest = torch.minimum(nearest, distance)
    covered = nearest.isfinite().float()[:, None]
    return TrueViews(F.avg_pool2d(colors.permute(0, 3, 1, 2), _OVER), F.avg_pool2d(covered, _OVER))


def unseen_cameras() -> Cameras:
    """Returns 16 cameras whose azimuths and elevations match no training view exactly."""
    around = turntable(16)
    return Cameras.of(around.azimuth_deg + 11.25, torch.tensor([0.0, 12.0, 24.0, 36.0]).repeat(4).tolist())


def overlap(opacity: Tensor, coverage: Tensor) -> float:
    """Returns the intersection over union of the pixels that are more than half covered, averaged over the views."""
    a, b = opacity > 0.5, coverage > 0.5
    return float(((a & b).sum((1, 2, 3)) / (a | b).sum((1, 2, 3))).mean())
