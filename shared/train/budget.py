"""The limit on a run's length, in steps or minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """A limit on a run's length: either `steps`, counted from the start of the run, or `minutes`, counted from now."""

    steps: int | None = None
    minutes: float | None = None
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"a budget needs exactly one of steps and minutes: {self.steps=}, {self.minutes=}")

    def spent(self, step: int, warmup: int = 0) -> float:
        """Returns the fraction of the budget that has been spent. The run is over when this fraction reaches 1.

        For a budget in steps, the `warmup` steps are not counted.
        """
        if self.steps is not None:
            return (step - warmup) / max(1, self.steps - warmup)
        return (time.monotonic() - self.begun) / (60 * max(self.minutes or 0.0, 1e-9))

    def over(self, step: int) -> bool:
        """Returns whether the run ends before this step."""
        return step >= self.steps if self.steps is not None else self.spent(step) >= 1
