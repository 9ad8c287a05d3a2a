"""Tests settings that change over a run, and timesteps drawn from scheduled ranges."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter

from pcs_3d.guidance.times import Times
from pcs_3d.schedules import Moment, Schedule
from shared.train.loop import generator

CHECKED = TypeAdapter(Schedule)


def over_run(schedule, steps: int = 10) -> list[float]:
    return [Moment(i, steps).of(CHECKED.validate_python(schedule)) for i in range(steps)]


def test_schedules_can_be_given_in_steps_or_in_shares_of_the_run():
    assert over_run(3) == [3.0] * 10
    assert over_run([2, 1.0, 3.0, 6]) == [1, 1, 1, 1.5, 2, 2.5, 3, 3, 3, 3]
    assert over_run([0.2, 1.0, 3.0, 0.6]) == pytest.approx(over_run([2, 1.0, 3.0, 6]))
    assert over_run([5, 0.98, 0.5, 5]) == [0.98] * 5 + [0.5] * 5, "the value jumps at step 5"
    assert over_run([0, 0.0, 4.0, 4, 2.0, 8]) == [0, 1, 2, 3, 4, 3.5, 3, 2.5, 2, 2], "the schedule has two pieces"
    assert Moment(1, 10).of(CHECKED.validate_python([0, 0.0, 1.0, 1.0])) == 0.1, (
        "the schedule goes from step 0 to the end of the run"
    )


@pytest.mark.parametrize(
    ("wrong", "why"),
    [([1, 2], "not a schedule"), ([0, 1, 2, 3, 4], "not a schedule"), ([6, 1.0, 2.0, 3], "must not decrease"),
     ([0.0, 1.0, 2.0, 1.5], "shares"),
     ([-1, 1.0, 2.0, 3], "shares")],
)  # fmt: skip
def test_invalid_schedules_are_refused(wrong, why):
    with pytest.raises(ValueError, match=why):
        CHECKED.validate_python(wrong)


def drawn(times: Times, step: int, steps: int = 100, count: int = 4, discrete: bool = True):
    return times.draw(count, Moment(step, steps), generator(0, step), discrete)


def test_annealed_timesteps_decrease_as_in_the_papers():
    square_root, line = Times(low=0.3, high=0.98, anneal=0.5), Times(low=0.02, high=0.98, anneal=1.0)
    falling = [float(drawn(square_root, i)[0]) for i in range(100)]
    assert falling == sorted(falling, reverse=True) and falling[0] == 980
    assert falling[25] == pytest.approx(1000 * (0.98 - 0.68 * 0.5), abs=1) and falling[99] >= 300
    assert float(drawn(line, 50, discrete=False)[0]) == pytest.approx(500.0)


def test_random_timesteps_stay_in_their_range_and_can_be_shared_by_all_views():
    narrowing = Times(low=0.02, high=[0.5, 0.98, 0.5, 0.5])
    late = torch.cat([drawn(narrowing, i, count=16) for i in range(50, 100)])
    early = torch.cat([drawn(narrowing, i, count=16) for i in range(50)])
    assert int(late.min()) >= 20 and int(late.max()) < 500 < int(early.max())
    one = drawn(Times(same=True), 3)
    assert len(set(one.tolist())) == 1 and len(set(drawn(Times(), 3).tolist())) > 1
    assert drawn(Times(), 3).dtype == torch.long and drawn(Times(), 3, discrete=False).is_floating_point()
    with pytest.raises(ValueError, match="at step 91, but 0 ≤ low"):
        drawn(Times(low=0.5, high=[0.0, 0.9, 0.1, 1.0]), 90)
