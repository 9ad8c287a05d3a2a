"""The toybox overlay's rules depend on the trained parts, kinds and modality, and apply to shipped and user recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared.recipe.overlay import Rules, unstated
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load
from shared.recipe.schema import Recipe

FILE = {
    "common": {"train": {"batch_size": 3}},
    "by_modality": {"image": {"train": {"resolution": 8}}, "video": {"train": {"resolution": 4}}},
    "by_trained": {
        "lora": {"alone": {"train": {"steps": 10}}, "phase": {"train": {"steps": 5}}},
        "tokens": {"alone": {"train": {"steps": 20}}, "phase": {"train": {"steps": 2}}},
    },
    "by_kind": {"trainable": {"peft": {"lr": 0.1}, "peft.OFT": {"lr": 0.2}}},
    "recipes": {"a": {"seed": 1}, "b": {"seed": 2}},
}


@pytest.fixture
def user_recipe(tmp_path: Path) -> Callable[..., Recipe]:
    def make(text: str, *overrides: str) -> Recipe:
        (tmp_path / "mine.yaml").write_text(text)
        return load(str(tmp_path / "mine.yaml"), overrides)

    return make


def rules(data: dict[str, Any], modality: str = "image", **more: Any) -> dict[str, Any]:
    return Rules(FILE, modality, {}).of(data, **more)


def test_the_number_of_steps_depends_on_the_trained_parts() -> None:
    both = {"trainable": {"t": {"kind": "tokens"}, "lora": {}}}
    assert rules(both)["train"]["steps"] == 10, "the kind that comes first in the overlay determines the number"
    assert rules({"trainable": {"t": {"kind": "tokens"}}})["train"]["steps"] == 20
    assert "steps" not in rules({"trainable": {"x": {"kind": "svd"}}})["train"]
    laid = rules({"trainable": {"tokens": {}}, "phases": {"a": None, "b": {"trainable": {"lora": {}}}}})
    assert "steps" not in laid["train"]
    assert [laid["phases"][name]["train"]["steps"] for name in "ab"] == [2, 5]


def test_the_overlay_sets_no_number_of_steps_for_a_phase_that_does_not_tune() -> None:
    laid = rules({"trainable": {"lora": {}}, "phases": {"a": {"task": "generate"}, "b": {"task": {"kind": "tune"}}}})
    assert "train" not in laid["phases"]["a"] and laid["phases"]["b"]["train"] == {"steps": 5}


def test_each_modality_and_each_type_has_its_own_rules() -> None:
    assert rules({})["train"] == {"batch_size": 3, "resolution": 8}
    assert rules({}, "video")["train"] == {"batch_size": 3, "resolution": 4}
    assert rules({}, "3d")["train"] == {"batch_size": 3}
    parts = rules({"trainable": {"x": {"kind": "peft", "type": "OFT"}, "peft": {"type": "LOKR"}}})["trainable"]
    assert (parts["x"]["lr"], parts["peft"]["lr"]) == (0.2, 0.1)
    assert rules({}, methods=["a", "b"])["seed"] == 2 and rules({}, methods=["b"])["seed"] == 2


def test_a_rule_for_a_method_does_not_restore_a_part_that_a_variant_removed() -> None:
    rule = {"trainable": {"lora": {"kind": "lora", "rank": 4}, "tokens": {"lr": 1}}, "train": {"steps": 7}}
    file = {"recipes": {"a": {**rule, "phases": {"p": rule}}}}

    def laid(data: dict[str, Any]) -> dict[str, Any]:
        return Rules(file, "image", {}).of(data, ["a"])

    assert laid({"trainable": {"lora": None}})["trainable"] == {}
    assert laid({})["train"] == {"steps": 7}, "the rule's other settings still apply"
    assert laid({"trainable": {"lora": {"kind": "peft"}}})["trainable"] == {}, "the rule skips a part of another kind"
    assert laid({"trainable": {"lora": {}}})["trainable"] == {"lora": {"kind": "lora", "rank": 4}}
    phased = laid({"phases": {"p": {"trainable": {"tokens": {}}}}})
    assert phased["trainable"] == {} and phased["phases"]["p"]["trainable"] == {"tokens": {"lr": 1}}


def test_a_rule_for_one_kind_of_a_single_part_is_skipped_for_another_kind() -> None:
    rule = {"field": {"kind": "voxels", "resolution": 24}}
    file = {"recipes": {"a": rule}}
    for data, laid in (({}, rule), ({"field": {"bound": 1}}, rule), ({"field": {"kind": "gaussians"}}, {})):
        assert Rules(file, "3d", {}).of(data, ["a"]) == laid, data
    any_kind = {"recipes": {"a": {"field": {"resolution": 24}}}}
    laid = Rules(any_kind, "3d", {}).of({"field": {"kind": "tetrahedra"}}, ["a"])
    assert laid == {"field": {"resolution": 24}}, "a rule without a kind applies to every kind"


def test_a_rule_yields_to_settings_that_still_apply() -> None:
    stated = [{"x": {"a": 1, "b": 2}}]
    rule = {"x": {"a": 10, "b": 10, "c": 10}}
    assert unstated(rule, stated, {"x": {"a": 1}}, {}) == {"x": {"b": 10, "c": 10}}, (
        "b was dropped when the kind changed, so the rule sets it"
    )
    assert unstated(rule, [{"x": 3}], {"x": 3}, {}) == {}, "a wrong value is kept, so that validation refuses it"
    phased = {"phases": {"p": {"x": {"a": 10}}, "gone": {"x": {"a": 10}}}}
    assert unstated(phased, [], {"x": {}, "phases": {"p": {}}}, {}) == {"phases": {"p": {"x": {"a": 10}}}}
    assert unstated(phased, stated, {"x": {"a": 1}, "phases": {"p": {}}}, {}) == {"phases": {"p": {"x": {}}}}


def test_a_user_recipe_gets_the_toybox_training_settings(user_recipe: Callable[..., Recipe]) -> None:
    shipped = {name: load(name) for name in ("dreambooth_lora", "textual_inversion", "pivotal_tuning")}
    lora, tokens = (
        user_recipe("trainable: {lora: {rank: 2}}"),
        user_recipe("trainable: {tokens: {}}\nmodifier: {kind: learnable_token}"),
    )
    assert lora.train == shipped["dreambooth_lora"].train and tokens.train == shipped["textual_inversion"].train
    two = "modifier: {kind: learnable_token}\nphases: {a: {trainable: {tokens: {}}}, b: {trainable: {lora: {}}}}"
    phases, expected = (dict(expand_phases(r)) for r in (user_recipe(two), shipped["pivotal_tuning"]))
    assert [p.train for p in phases.values()] == [p.train for p in expected.values()]
    assert user_recipe("trainable: {lora: {}}\ntrain: {steps: 7}").train.steps == 7
    assert user_recipe("trainable: {lora: {}}\ntrain: {steps: 7}", "train.steps=9").train.steps == 9
