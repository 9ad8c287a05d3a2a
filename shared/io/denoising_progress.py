"""Progress callbacks, passed from the display down to the innermost loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

#: Called after each denoising step with the number of steps done and the total number of steps. Steps are counted per
#: picture, so four pictures with 50 steps each count as 200 steps.
Steps = Callable[[int, int], None]


def named(progress: Callable[[str, int, int], None] | None, what: str) -> Steps | None:
    """Returns a callback that passes its counts on to `progress`, labelled with `what`, or None if there is no
    `progress`."""
    return partial(progress, f"{what}, denoising steps") if progress else None


def part_of(progress: Steps | None, start: int, count: int, total: int) -> Steps | None:
    """Returns a callback for a group of `count` pictures, of which `start` is the first. It reports progress over all
    `total` pictures."""
    if progress is None:
        return None

    def part(done: int, of: int) -> None:
        each = of // count
        progress(start * each + done, total * each)

    return part
