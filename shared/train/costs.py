"""Measures what a run costs in memory and, separately for each kind of work, in time."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch


class Clock:
    """Counts the seconds spent on each kind of work.

    `on("b")` inside `on("a")` counts for "b" and pauses the count for "a"; `on(None)` pauses all counts.
    """

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        self._spent = dict(spent or {})
        self._what: str | None = None
        self._since = time.perf_counter()

    @contextmanager
    def on(self, what: str | None) -> Iterator[None]:
        outer = self._what
        self._turn(what)
        try:
            yield
        finally:
            self._turn(outer)

    def _turn(self, what: str | None) -> None:
        now = time.perf_counter()
        if self._what is not None:
            self._spent[self._what] = self._spent.get(self._what, 0.0) + now - self._since
        self._what, self._since = what, now

    @property
    def spent(self) -> dict[str, float]:
        """The seconds spent so far, by kind of work."""
        self._turn(self._what)
        return dict(self._spent)


def watch_memory(device: torch.device) -> None:
    """Resets the measurement of peak memory on a GPU. Does nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Returns the peak memory in bytes, and the name of what was measured.

    The name is "gpu" (all tensors since `watch_memory`) or "process" (the whole process).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "gpu"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process"


def summary(clock: Clock, device: torch.device, before: int = 0) -> dict[str, float | int | str]:
    """Returns the costs that are recorded in a concept's metrics.

    These are the peak memory in bytes, and the seconds spent on optimization (`training_seconds`), on reading and
    generating training pictures (`class_pictures_seconds`) and on validation.

    Args:
        before: the peak memory before the run was interrupted, or 0 if it was not
    """
    spent, (peak, of) = clock.spent, peak_memory(device)
    return {
        "training_seconds": round(spent.get("optimisation", 0.0), 3),
        "class_pictures_seconds": round(spent.get("class_pictures", 0.0), 3),
        "validation_seconds": round(spent.get("validation", 0.0), 3),
        "training_peak_memory": max(before, peak),
        "training_peak_memory_of": of,
    }
