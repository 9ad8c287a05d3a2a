"""Tracks points through a clip."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.clips.flow_fields import FlowFields, confirmed, flow_fields, sampled

PER_SIDE = 24  # points along the shorter side of a frame
LEAST = 16  # number of points that should lie inside a mask; the grid is refined until at least this many do


@dataclass(frozen=True)
class Tracks:
    """N points tracked over F frames.

    A point that is lost (hidden, out of the frame, or not confirmed by the backward flow) stays lost.
    """

    points: Tensor  # float64 [N, F, 2]: x right, y down, in pixels; the centre of the first pixel is (0, 0)
    visible: Tensor  # bool [N, F]
    size: tuple[int, int]  # height and width of the frames in pixels

    def __post_init__(self) -> None:
        if self.points.ndim != 3 or self.points.shape[2] != 2 or self.visible.shape != self.points.shape[:2]:
            raise ValueError(
                f"tracks: expected points [N, F, 2] and visible [N, F], got {list(self.points.shape)} and "
                f"{list(self.visible.shape)}"
            )

    @property
    def frames(self) -> int:
        return self.points.shape[1]

    @property
    def reach(self) -> Tensor:
        """Each point's largest distance from its start, float64 `[N]`, as a fraction of the frame's shorter side."""
        return (self.points - self.points[:, :1]).double().norm(dim=2).amax(1) / min(self.size)


def track_points(clip: Tensor, mask: Tensor | None = None, per_side: int = PER_SIDE) -> Tracks:
    """Follows a grid of points through a clip `[3, F, H, W]` in [-1, 1]; see `follow`."""
    return follow(flow_fields(clip), mask, per_side)


def follow(fields: FlowFields, mask: Tensor | None = None, per_side: int = PER_SIDE) -> Tracks:
    """Follows a grid of points from the first frame along the flow.

    A point is visible as long as the backward flow confirms its movement (`confirmed`).

    Args:
        mask: where the first frame should have points (above 0.5), `[H, W]` or `[1, H, W]`. The grid is refined until
            16 points lie inside the mask or every pixel has a point
        per_side: number of points along the shorter side

    Raises:
        ValueError: if the mask is empty or not the same size as the frames
    """
    starts = _grid(fields.size, per_side) if mask is None else _inside(fields.size, mask, per_side)
    cells = fields.cells_per_pixel
    at = (starts + 0.5) * cells - 0.5
    seen = torch.ones(len(at), dtype=torch.bool)
    points, visible = [at], [seen]
    height, width = fields.forward.shape[1:3]
    bound = torch.tensor([width - 1, height - 1], dtype=torch.float64)
    for forward, backward in zip(fields.forward, fields.backward, strict=True):
        ahead = sampled(forward, at)
        then = at + ahead
        inside = ((then >= 0) & (then <= bound)).all(1)
        seen = seen & inside & confirmed(ahead, backward, at)
        at = torch.where(seen[:, None], then, at)  # a lost point stays where it was last seen
        points.append(at)
        visible.append(seen)
    in_pixels = (torch.stack(points, 1) + 0.5) / cells - 0.5
    return Tracks(in_pixels, torch.stack(visible, 1), fields.size)


def _grid(size: tuple[int, int], per_side: int) -> Tensor:
    """Returns the centres of equal cells, `[N, 2]` (x, y), with `per_side` cells along the shorter side."""
    spacing = min(size) / per_side
    rows, columns = (_middles(length, spacing) for length in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)


def _middles(length: int, spacing: float) -> Tensor:
    count = max(1, round(length / spacing))
    return (torch.arange(count, dtype=torch.float64) + 0.5) * length / count - 0.5


def _inside(size: tuple[int, int], mask: Tensor, per_side: int) -> Tensor:
    plane = mask[0] if mask.ndim == 3 else mask
    if tuple(plane.shape) != size:
        raise ValueError(f"a mask of shape {list(mask.shape)} does not match frames of {size[0]}x{size[1]} pixels")
    if not bool((plane > 0.5).any()):
        raise ValueError("the mask of the first frame is empty, so there are no points to follow")
    while True:
        grid = _grid(size, per_side)
        column, row = grid.round().long().unbind(1)
        inside = grid[plane[row, column] > 0.5]
        if len(inside) >= LEAST or per_side >= min(size):
            return inside
        per_side = min(2 * per_side, min(size))
