"""Grids of settings, and the paired difference between a variant and a control."""

from __future__ import annotations

import pytest

from shared.benchmark.experiment import compare
from shared.benchmark.toybox import chosen_things, count_or_names
from shared.benchmark.variants import varied
from shared.metrics.report import Report, Score


def test_a_grid_adds_every_combination_to_the_common_settings():
    rows = varied({"a": "a", "b": "b.yaml"}, ("seed=1",), ("train.steps=10,20", "trainable.lora.roles=[q, k],[v]"))
    assert len(rows) == 8
    assert rows["b train.steps=20 trainable.lora.roles=[q, k]"].recipe == "b.yaml"
    last = rows["b train.steps=20 trainable.lora.roles=[q, k]"].overrides
    assert last == ("seed=1", "train.steps=20", "trainable.lora.roles=[q, k]")
    assert list(varied({"a": "a"}, (), ())) == ["a"]
    strengths = varied({"a": "a"}, (), ('sampling.strength=1@0,"0@0,1@0.1"',))
    assert list(strengths) == ["a sampling.strength=1@0", "a sampling.strength=0@0,1@0.1"]


@pytest.mark.parametrize(
    ("grid", "reason"),
    [
        (("train.steps",), "is not an axis of a grid"),
        (("train.steps=10,,20",), "is not an axis of a grid"),
        (("train.steps=10,10",), "lists a value twice"),
        (("seed=1,2", "seed=3"), "seed is varied twice"),
        (("seed=" + ",".join(map(str, range(1001))),), "the grid has 1,001 rows"),
    ],
)
def test_invalid_grids_are_refused(grid, reason):
    with pytest.raises(ValueError, match=reason):
        varied({"a": "a"}, (), grid)


def test_subjects_can_be_given_as_a_count_or_by_name():
    assert count_or_names("3") == 3 and count_or_names("x, y") == ("x", "y")
    assert chosen_things("development", ("development-mug", "development-mug")) == ["development-mug"]
    assert len(chosen_things("reporting", 2)) == 2
    with pytest.raises(ValueError, match="development-"):
        chosen_things("development", ("development-mgu",))
    for text in ("0", "99999", "a,,b"):
        with pytest.raises(ValueError, match="--subjects"):
            count_or_names(text)


def _report(recipe: str, subject: str, value: float) -> Report:
    score = Score(key="trade_off", title="Trade-off", value=value)
    return Report(name=subject, recipe=recipe, scores=[score])


def test_the_difference_from_the_control_is_paired_by_subject():
    control, ours = {"x": 0.2, "y": 0.7, "z": 0.5}, {"x": 0.3, "y": 0.8, "z": 0.6, "only-ours": 1.0}
    reports = {("c", s): _report("c", s, v) for s, v in control.items()}
    reports |= {("o", s): _report("o", s, v) for s, v in ours.items()}
    table = compare(reports, control="c")
    ahead = table.ahead("o")
    assert ahead is not None and ahead.value == pytest.approx(0.1)
    # Every subject gains 0.1, and the spread between subjects does not widen a paired interval.
    assert (ahead.low, ahead.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert table.ahead("c") is None and compare(reports).ahead("o") is None
    assert "ahead of c" in table.markdown() and "Ahead of c" in table.html()
