"""Splits a batch into equal shares and processes each in its own thread (data parallelism within one CPU).

On a machine that is also busy with other work, this is far faster than using the same number of threads inside each
operation, because threads wait for each other only once per step, not once per operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class BatchShares:
    """Computes losses in `workers` threads, each of which uses one core."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool = (
            ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) if workers > 1 else None
        )

    def mean_loss(self, loss: Callable[[T], Tensor], shares: Sequence[T], parameters: Sequence[nn.Parameter]) -> Tensor:
        """Returns the mean of `loss` over `shares`, of which there must be one per worker. With several workers, the
        gradients with respect to `parameters` are computed here and summed in the order of the shares. The backward
        pass then merely returns them."""
        assert len(shares) == self.workers
        if self._pool is None:
            return loss(shares[0])

        def work(share: T) -> tuple[Tensor, Sequence[Tensor | None]]:
            with torch.enable_grad():
                value = loss(share) / self.workers
                return value.detach(), torch.autograd.grad(value, parameters, allow_unused=True)

        done = list(self._pool.map(work, shares))
        used = [i for i, gradient in enumerate(done[0][1]) if gradient is not None]  # None means no effect on the loss
        total: list[Tensor | None] = list(done[0][1])
        for _, more in done[1:]:
            torch._foreach_add_([total[i] for i in used], [more[i] for i in used])  # type: ignore[arg-type]
        value = torch.stack([value for value, _ in done]).sum()
        return _Precomputed.apply(value, total, *parameters)  # type: ignore[return-value]


class _Precomputed(torch.autograd.Function):
    """A value whose gradients are already known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Sequence[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Any, ...]:
        return None, None, *(None if g is None else g * scale[0] for g in ctx.gradients)
