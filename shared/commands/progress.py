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
