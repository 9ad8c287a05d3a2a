"""Schedules, which are numbers in a recipe that can change over a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from shared.config import MOST_STEPS

#: One of a schedule's values or times.
Number = Annotated[int, Field(ge=-MOST_STEPS, le=MOST_STEPS)] | Annotated[float, Field(ge=-MOST_STEPS, le=MOST_STEPS)]


def _check(schedule: Number | tuple[Number, ...]) -> Number | tuple[Number, ...]:
    if isinstance(schedule, int | float):
        return schedule
    if len(schedule) < 4 or len(schedule) % 2:
        raise ValueError(
            f"{list(schedule)} is not a schedule: give one number, or [from, value, value, to], optionally followed by "
            "more pairs of a value and the time at which it is reached"
        )
    for kind in (int, float):
        places = [p for p in _places(schedule) if type(p) is kind]
        if places != sorted(places):
            raise ValueError(f"{list(schedule)} is not a schedule: times must not decrease")
    if any(p < 0 or (isinstance(p, float) and p > 1) for p in _places(schedule)):
        raise ValueError(f"{list(schedule)} is not a schedule: times must be steps, or shares of the run (0.0 to 1.0)")
    return schedule


#: Either one constant number, or `[from, a, b, to]`. In the second form, the value is a until `from`, changes linearly
#: to b between `from` and `to`, and is b afterwards. Each further pair `c, then` adds a linear change to c that ends at
#: `then`. Times are steps if they are integers, and shares of the run if they have a decimal point. For example,
#: `[0.0, 0.98, 0.5, 0.5]` falls from 0.98 to 0.5 over the first half of the run.
Schedule = Annotated[Number | tuple[Number, ...], AfterValidator(_check)]


@dataclass(frozen=True)
class Moment:
    """A point in a run of `steps` steps. `step` is counted from 0."""

    step: int
    steps: int

    def of(self, schedule: Number | Sequence[Number]) -> float:
        """Returns the value of a schedule at this point."""
        if isinstance(schedule, int | float):
            return float(schedule)
        places = [p if isinstance(p, int) else p * self.steps for p in _places(schedule)]
        values = [float(schedule[1]), *(float(v) for v in schedule[2::2])]
        for (start, before), (end, after) in zip(
            zip(places, values, strict=True), zip(places[1:], values[1:], strict=True), strict=False
        ):
            if self.step < end:
                share = 0.0 if self.step <= start else (self.step - start) / (end - start)
                return before + share * (after - before)
        return values[-1]

    @property
    def share(self) -> float:
        """The share of the run that is finished, in [0, 1]."""
        return min(1.0, self.step / max(1, self.steps))


def _places(schedule: Sequence[Number]) -> list[Number]:
    return [schedule[0], *schedule[3::2]]
