"""Shows progress as a bar on a terminal and as plain lines in a log."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import Any

_EVERY = 10.0  # seconds between two log lines during training


class Tenths:
    """Prints a line to standard error each time a job completes another ten percent."""

    def __init__(self) -> None:
        self.printed: dict[str, int] = {}

    def __call__(self, what: str, done: int, of: int) -> None:
        tenth, before = 10 * done // max(1, of), self.printed.get(what, 0)
        if tenth > before or 0 < tenth < before:  # less than before: the job has restarted
            print(f"{what}: {done} of {of}", file=sys.stderr, flush=True)
        self.printed[what] = tenth


class Lines:
    """Shows each job's progress as a bar on a terminal, or as a line every ten percent. Call it with
    (job, done, total)."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[more]}"),
        )
        self.progress = Progress(*columns, disable=not sys.stderr.isatty(), console=_console())
        self.jobs: dict[str, Any] = {}
        self.tenths = Tenths()

    def __enter__(self) -> Any:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, what: str, done: int, of: int) -> None:
        self._show(what, what, done, of)
        if self.progress.disable:
            self.tenths(what, done, of)

    def _show(self, job: str, description: str, done: int, of: int, more: str = "") -> None:
        if job not in self.jobs:
            self.jobs[job] = self.progress.add_task(description, total=of, more="")
        self.progress.update(self.jobs[job], description=description, completed=done, total=of, more=more)


class Bar(Lines):
    """Shows one bar for training, with the loss and the remaining time, and one bar for each job that generates pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.done = 0
        self.loss: float | None = None  # a moving average; None until a step has a loss
        self.printed_at = time.monotonic()
        self.before: float | None = None  # when the last step ended; None if something else has run since
        self.took: deque[float] = deque(maxlen=50)  # the durations of the last steps in seconds

    def __enter__(self) -> Bar:
        return super().__enter__()

    def step(self, phase: str, record: Any, total: int) -> None:
        """Called after each training step; `total` is the number of steps in all phases."""
        now = time.monotonic()
        if self.before is not None:
            self.took.append(now - self.before)
        self.before = now
        self.done += 1
        if record.loss is not None:
            self.loss = record.loss if self.loss is None else 0.95 * self.loss + 0.05 * record.loss
        loss = "" if self.loss is None else f"loss {self.loss:.4f}"
        self._show("", phase, self.done, total, loss)
        if self.progress.disable and now - self.printed_at > _EVERY:
            self.printed_at = now
            said = [
                f"{phase}: step {record.step}",
                f"{self.done} of {total} done",
                loss,
                self._speed(total - self.done),
            ]
            print(", ".join(filter(None, said)), file=sys.stderr, flush=True)

    def pictures(self, what: str, done: int, of: int) -> None:
        """Called after each denoising step."""
        self.before = None  # the next step cannot be timed from the last one, because pictures are generated in between
        self(what, done, of)

    def _speed(self, steps_left: int) -> str:
        """Returns the average speed of the last steps that could be timed and an estimate of the remaining time. Returns "" if
        no step could be timed."""
        if not self.took or sum(self.took) <= 0:
            return ""
        each = sum(self.took) / len(self.took)
        speed = f"{1 / each:.1f} steps/s" if each < 1 else f"{each:.1f} s per step"
        return f"{speed}, about {_duration(each * steps_left)} left" if steps_left else speed


def _duration(seconds: float) -> str:
    """Returns a time such as "80 s", "12 min" or "2 h 5 min"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)
