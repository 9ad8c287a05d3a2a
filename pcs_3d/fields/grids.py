"""Dense grids of values over the cube [-bound, bound]³: positions of nodes, and interpolation between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def nodes(resolution: int, bound: float) -> Tensor:
    """[R, R, R, 3]: positions of a grid's nodes; indices run along x, y, z, and the outermost nodes lie on the bound."""
    line = torch.linspace(-bound, bound, resolution)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)


def trilinear(grid: Tensor, points: Tensor, bound: float) -> Tensor:
    """Interpolated values: grid [R, R, R, C], points [..., 3] -> [..., C]; beyond the bound, the values on its surface.

    Differentiable in both, but only once.
    """
    size = grid.shape[0]
    flat = points.reshape(-1, 3)
    place = ((flat / bound + 1) * ((size - 1) / 2)).clamp(0, size - 1)
    corner = place.detach().floor().clamp(max=size - 2)
    along = place - corner
    x, y, z = corner.long().unbind(1)
    i = torch.arange(2, device=grid.device)
    steps = ((i[:, None, None] * size + i[:, None]) * size + i).reshape(8)
    sides = torch.stack([1 - along, along], 1)  # [N, 2, 3]
    weights = sides[:, :, None, None, 0] * sides[:, None, :, None, 1] * sides[:, None, None, :, 2]
    rows = ((x * size + y) * size + z)[:, None] + steps
    return weighted_rows(grid.reshape(size**3, -1), rows, weights.reshape(-1, 8)).reshape(*points.shape[:-1], -1)


def weighted_rows(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Sums of a table's rows: table [M, C], rows int64 [N, k], weights [N, k] -> [N, C]."""
    return _WeightedRows.apply(table, rows, weights)  # type: ignore[return-value]


class _WeightedRows(torch.autograd.Function):
    """`embedding_bag` with a faster backward pass: its own sorts the rows and takes four times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(table, rows, weights)
        return F.embedding_bag(rows, table, per_sample_weights=weights, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad,), (table, rows, weights) = grads, ctx.saved_tensors
        of_table = of_weights = None
        if ctx.needs_input_grad[0]:
            flat, size = rows.reshape(-1), table.shape[0]
            columns = [
                grad.new_zeros(size).scatter_add_(0, flat, (weights * g[:, None]).reshape(-1)) for g in grad.unbind(1)
            ]
            of_table = torch.stack(columns, 1)
        if ctx.needs_input_grad[2]:
            of_weights = (table[rows] * grad[:, None]).sum(-1)
        return of_table, None, of_weights


def of_cells(
    cells: Sequence[Tensor], origins: Tensor, directions: Tensor, distances: Tensor, bound: float
) -> tuple[list[Tensor], Tensor]:
    """For each grid of cell values [R, R, R], the values [N, S] of the cells that rays [N, 3], [N, 3] are in at distances
    [N, S]; and bool [N, S]: whether a point is within the bound (outside it, values are arbitrary).

    Works on one axis at a time, each contiguous, with 32-bit integers: points [N, S, 3] would take three times as long.
    """
    size = len(cells[0])
    scale = size / (2 * bound)
    start, along = (origins + bound) * scale, directions * scale
    number = torch.zeros(distances.shape, dtype=torch.int32, device=distances.device)
    inside = torch.ones(distances.shape, dtype=torch.bool, device=distances.device)
    for axis in range(3):
        place = torch.addcmul(start[:, axis, None], along[:, axis, None], distances)
        inside &= (place >= 0) & (place <= size)
        number.mul_(size).add_(place.clamp_(0, size - 1).int())
    row = number.view(-1)
    # index_select: indexing with brackets takes four times as long on a CPU
    return [values.reshape(-1).index_select(0, row).view(distances.shape) for values in cells], inside


def cell_maxima(grid: Tensor) -> Tensor:
    """[R, R, R] values at nodes -> [R-1, R-1, R-1]: the largest of each cell's eight corners, an upper bound on the
    interpolated values."""
    for axis in range(3):
        low, high = grid.narrow(axis, 0, grid.shape[axis] - 1), grid.narrow(axis, 1, grid.shape[axis] - 1)
        grid = torch.maximum(low, high)
    return grid


def slopes(grid: Tensor, bound: float) -> Tensor:
    """[R, R, R] -> [R, R, R, 3]: central differences, one-sided at the border, per unit of length."""
    return torch.stack(torch.gradient(grid, spacing=2 * bound / (grid.shape[0] - 1)), -1)


def total_variation(grid: Tensor) -> Tensor:
    """The mean squared difference between neighbours of [R, R, R, C], summed over the three directions."""
    return torch.stack([(grid.narrow(a, 1, n - 1) - grid.narrow(a, 0, n - 1)).square().mean()
                        for a, n in enumerate(grid.shape[:3])]).sum()  # fmt: skip


def by_chunks(function: Callable[[Tensor], Tensor], points: Tensor, size: int = 1 << 17) -> Tensor:
    """function(points [N, 3]) -> [N, ...], computed for `size` points at a time."""
    return torch.cat([function(chunk) for chunk in points.split(size)])
