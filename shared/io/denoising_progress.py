"""Progress callbacks, passed from the display down to the innermost loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

#: Called with (done, of) after each denoising step. Steps are counted per picture: four pictures with 50 steps each make 200.
Steps = Callable[[int, int], None]


def named(progress: Callable[[str, int, int], None] | None, what: str) -> Steps | None:
    """Returns a (done, of) callback that passes (what, done, of) to `progress`."""
    return partial(progress, f"{what}, denoising steps") if progress else None


def part_of(progress: Steps | None, start: int, count: int, total: int) -> Steps | None:
    """Returns a callback for pictures `start` to `start + count` that reports progress over all `total` pictures."""
    if progress is None:
        return None

    def part(done: int, of: int) -> None:
        each = of // count
        progress(start * each + done, total * each)

    return part
