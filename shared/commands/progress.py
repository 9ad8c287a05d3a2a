"""Progress on the terminal: a bar where somebody looks, plain lines where a log is kept."""

from __future__ import annotations

import sys
import time
from typing import Any


class StepBar:
    """A bar over training steps, with loss, speed and the time that is left."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self.progress = Progress(*columns, disable=not sys.stderr.isatty(), console=_console())
        self.task: Any = None
        self.done, self.loss, self.start, self.said = 0, 0.0, time.monotonic(), time.monotonic()

    def __enter__(self) -> StepBar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, phase: str, record: Any, total: int) -> None:
        self.done += 1
        self.loss = record.loss if self.done == 1 else 0.95 * self.loss + 0.05 * record.loss
        if self.task is None:
            self.task = self.progress.add_task(phase, total=total, loss="")
        self.progress.update(self.task, advance=1, description=phase, loss=f"loss {self.loss:.4f}")
        if self.progress.disable and time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            speed = self.done / (self.said - self.start)
            print(
                f"{phase}: step {record.step}, {self.done} of {total} done, loss {self.loss:.4f}, {speed:.1f} steps/s",
                file=sys.stderr,
            )


class Counter:
    """Called as (what, done, of): how far an evaluation is."""

    def __init__(self) -> None:
        from rich.progress import Progress

        self.progress = Progress(disable=not sys.stderr.isatty(), console=_console())
        self.tasks: dict[str, Any] = {}

    def __enter__(self) -> Counter:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, what: str, done: int, of: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=of)
        self.progress.update(self.tasks[what], completed=done)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


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
