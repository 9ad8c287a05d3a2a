"""Draws the next step's batch while a GPU computes the current step."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

B = TypeVar("B")


class Prefetch(Generic[B]):
    """Calls `draw` one step ahead in a thread, as long as steps are requested in order. This does not change the
    batches.

    Args:
        draw: draws the batch of a step; the batch must depend only on the step
        device: the device that computes the steps. On a CPU, nothing is drawn ahead, because drawing would compete with
            the computation for the same cores.
    """

    def __init__(self, draw: Callable[[int], B], device: torch.device) -> None:
        self.draw = draw
        self.pool = ThreadPoolExecutor(1) if device.type != "cpu" else None
        self.ahead: dict[int, Future[B]] = {}

    def __call__(self, step: int) -> B:
        """Returns the batch of a step. Raises any error that occurred while the batch was drawn."""
        if self.pool is None:
            return self.draw(step)
        found = self.ahead.pop(step, None)
        self.ahead = {step + 1: self.pool.submit(self.draw, step + 1)}
        return found.result() if found is not None else self.draw(step)
