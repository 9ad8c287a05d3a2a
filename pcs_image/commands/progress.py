"""Progress of pictures that are made: bars on a terminal, and a line every ten percent where a log is kept."""

from __future__ import annotations

import sys
import time
from typing import Any

from shared.commands.progress import Counter, StepBar


class Tenths:
    """A line on standard error for the first step of each ten percent of a job, and for its end."""

    def __init__(self) -> None:
        self.said: dict[str, int] = {}

    def __call__(self, what: str, done: int, of: int) -> None:
        tenth = 10 * done // max(1, of)
        if tenth > self.said.get(what, 0):
            self.said[what] = tenth
            print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)


class Lines(Counter):
    """A counter that also says something without a terminal."""

    def __init__(self) -> None:
        super().__init__()
        self.tenths = Tenths()

    def __call__(self, what: str, done: int, of: int) -> None:
        super().__call__(what, done, of)
        if self.progress.disable:
            self.tenths(what, done, of)


class Bar(StepBar):
    """A bar of training steps, and one of the class pictures that are made before them."""

    def __init__(self) -> None:
        super().__init__()
        self.tenths = Tenths()
        self.jobs: dict[str, Any] = {}

    def __enter__(self) -> Bar:
        super().__enter__()
        return self

    def step(self, phase: str, record: Any, total: int) -> None:
        if not self.done:  # speed is that of the steps, without the class pictures before them
            self.start = time.monotonic()
        super().step(phase, record, total)

    def pictures(self, what: str, done: int, of: int) -> None:
        if what not in self.jobs:
            self.jobs[what] = self.progress.add_task(what, total=of, loss="")
        self.progress.update(self.jobs[what], completed=done)
        if self.progress.disable:
            self.tenths(what, done, of)
