"""Progress callbacks, passed from the display down to the innermost loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

#: Called after each denoising step with the number of steps done and their total. Steps are counted per picture, so
#: four pictures with 50 steps each make 200.
Steps = Callable[[int, int], None]


def named(progress: Callable[[str, int, int], None] | None, what: str) -> Steps | None:
    """Returns a callback that passes its counts on to `progress`, labelled with `what`."""
    return partial(progress, f"{what}, denoising steps") if progress else None


def part_of(progress: Steps | None, start: int, count: int, total: int) -> Steps | None:
    """Returns a callback for pictures `start` to `start + count` that reports progress over all `total` pictures."""
    if progress is None:
        return None

    def part(done: int, of: int) -> None:
        each = of // count
        progress(start * each + done, total * each)

    return part
