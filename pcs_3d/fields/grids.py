"""Interpolation and other functions for dense grids of values over the cube [-bound, bound]³."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def nodes(resolution: int, bound: float) -> Tensor:
    """Returns the positions of a grid's nodes, `[R, R, R, 3]`. The indices run along x, y and z, and the outermost
    nodes lie on the bound."""
    line = torch.linspace(-bound, bound, resolution)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)


def trilinear(grid: Tensor, points: Tensor, bound: float) -> Tensor:
    """Interpolates a grid (`[R, R, R, C]`) at points (`[..., 3]`) and returns the values, `[..., C]`. Points beyond the
    bound get the value at the nearest point on the bound.

    The result is differentiable with respect to the grid and the points. Second derivatives are not supported.
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
    """Returns N weighted sums (`[N, C]`), each over k rows of a table (`[M, C]`). `rows` (int64) and `weights` are
    `[N, k]`."""
    return _WeightedRows.apply(table, rows, weights)  # type: ignore[return-value]


class _WeightedRows(torch.autograd.Function):
    """`embedding_bag` with a faster backward pass. PyTorch's backward pass sorts the rows and takes four times as long
    on a CPU."""

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
    """Looks up the values of the cells that contain the points at S distances along each of N rays.

    Indices are computed axis by axis, as contiguous 32-bit integers. This is three times as fast as computing them from
    a tensor of points (`[N, S, 3]`).

    Args:
        cells: grids of cell values, each [R, R, R]
        origins, directions: [N, 3]
        distances: [N, S]

    Returns:
        The values from each grid, [N, S], and whether each point is within the bound, bool [N, S]. Outside the bound,
        the values are arbitrary.
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
    # indexing with brackets instead of index_select takes four times as long on a CPU
    return [values.reshape(-1).index_select(0, row).view(distances.shape) for values in cells], inside


def cell_maxima(grid: Tensor) -> Tensor:
    """Returns the largest value at the eight corners of each cell (`[R-1, R-1, R-1]`), which is an upper bound on the
    values interpolated in the cell. `grid` contains the values at nodes, `[R, R, R]`."""
    for axis in range(3):
        low, high = grid.narrow(axis, 0, grid.shape[axis] - 1), grid.narrow(axis, 1, grid.shape[axis] - 1)
        grid = torch.maximum(low, high)
    return grid


def slopes(grid: Tensor, bound: float) -> Tensor:
    """Returns the gradient of a grid (`[R, R, R]`) per unit length, `[R, R, R, 3]`. The differences are central inside
    the grid and one-sided at its border."""
    return torch.stack(torch.gradient(grid, spacing=2 * bound / (grid.shape[0] - 1)), -1)


def total_variation(grid: Tensor) -> Tensor:
    """Returns the mean squared difference between neighbouring values in a grid (`[R, R, R, C]`), summed over the three
    axes."""
    return torch.stack([(grid.narrow(a, 1, n - 1) - grid.narrow(a, 0, n - 1)).square().mean()
                        for a, n in enumerate(grid.shape[:3])]).sum()  # fmt: skip


def by_chunks(function: Callable[[Tensor], Tensor], points: Tensor, size: int = 1 << 17) -> Tensor:
    """Returns `function(points)`, computed for `size` points at a time. `points` is `[N, 3]`, and the result is
    `[N, ...]`."""
    return torch.cat([function(chunk) for chunk in points.split(size)])
