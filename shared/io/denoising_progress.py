"""How far something is, from the innermost loop to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

#: Told (done, of) after each denoising step, counted for each picture: four pictures of 50 steps are 200.
Steps = Callable[[int, int], None]


def named(progress: Callable[[str, int, int], None] | None, what: str) -> Steps | None:
    """(what, done, of) as (done, of)."""
    return partial(progress, f"{what}, denoising steps") if progress else None


def part_of(progress: Steps | None, start: int, count: int, total: int) -> Steps | None:
    """For the pictures `start` to `start + count` of `total`, what is told of all of them."""
    if progress is None:
        return None

    def part(done: int, of: int) -> None:
        each = of // count
        progress(start * each + done, total * each)

    return part
