"""The limit on a run's length, in steps or minutes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Budget:
    """Ends a run after `steps`, counted from its start, or after `minutes` from now."""

    steps: int | None = None
    minutes: float | None = None
    begun: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"give either steps or minutes, not both or neither: {self.steps=}, {self.minutes=}")

    def spent(self, step: int, warmup: int = 0) -> float:
        """Returns the fraction of the budget spent (for a budget in steps, after `warmup`); at 1 or more the run is over."""
        if self.steps is not None:
            return (step - warmup) / max(1, self.steps - warmup)
        return (time.monotonic() - self.begun) / (60 * max(self.minutes or 0.0, 1e-9))

    def over(self, step: int) -> bool:
        """Whether the run ends before this step."""
        return step >= self.steps if self.steps is not None else self.spent(step) >= 1
