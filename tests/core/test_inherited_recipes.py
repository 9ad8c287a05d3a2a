"""Recipe files inherit from their `base:` in the right order, and three shipped recipes match recorded settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from shared.config import read_yaml, validate
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load
from shared.recipe.schema import Recipe, dump

ELSEWHERE = "backbone=some/folder"
UserRecipe = Callable[..., Recipe]


@pytest.fixture
def user_recipe(tmp_path: Path) -> UserRecipe:
    """A function that writes recipe files and loads the first one."""

    def make(files: dict[str, str], *overrides: str) -> Recipe:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return load(str(tmp_path / next(iter(files))), overrides)

    return make


# --- the settings behind the toybox's figures -------------------------------------------------


def _differences(expected: Any, actual: Any, where: str = "") -> list[str]:
    if isinstance(expected, dict) and isinstance(actual, dict):
        missing = [f"{where}.{key} is gone" for key in expected if key not in actual]
        inside = [d for k, v in expected.items() if k in actual for d in _differences(v, actual[k], f"{where}.{k}")]
        return missing + inside
    return [] if expected == actual else [f"{where}: {expected!r} became {actual!r}"]


@pytest.mark.parametrize("name", ["textual_inversion", "dreambooth_lora", "pivotal_tuning"])
def test_three_recipes_resolve_to_the_toybox_settings_behind_the_readme_figures(name: str) -> None:
    expected = read_yaml(Path(__file__).parent / "toybox_recipes.yaml")[name]
    assert not _differences(expected, dump(load(name)))


# --- inheriting -------------------------------------------------------------------------------


def test_a_variant_states_only_what_differs(user_recipe: UserRecipe) -> None:
    base = load("dreambooth_lora", [ELSEWHERE])
    variant = user_recipe({"mine.yaml": "base: dreambooth_lora\ntrainable: {lora: {dora: true}}\nseed: 3"}, ELSEWHERE)
    lora = base.trainable["lora"].model_copy(update={"dora": True})
    assert variant == base.model_copy(update={"method": "mine", "seed": 3, "trainable": {"lora": lora}})
    assert "base" not in dump(variant) and validate(Recipe, yaml.safe_load(yaml.safe_dump(dump(variant)))) == variant


def test_a_base_is_found_by_name_next_to_the_file_and_in_the_home_folder(
    user_recipe: UserRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "sub/leaf.yaml": "base: ../middle.yaml\ntrain: {steps: 3}",
        "middle.yaml": "base: sub/root.yaml\ntrain: {steps: 2, batch_size: 2}\nname: between",
        "sub/root.yaml": "base: textual_inversion\ntrain: {steps: 1, batch_size: 1, optimizers: {main: {warmup: 5}}}",
    }
    leaf = user_recipe(files, ELSEWHERE)
    assert (leaf.method, leaf.name, leaf.title) == ("leaf", "between", "Textual Inversion")
    assert (leaf.train.steps, leaf.train.batch_size, leaf.train.optimizers["main"].warmup) == (3, 2, 5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_recipe({"third.yaml": "base: ~/sub/leaf.yaml\nseed: 9"}, ELSEWHERE).train.steps == 3


def test_a_new_kind_drops_the_settings_of_the_old_one_and_null_removes_a_part(user_recipe: UserRecipe) -> None:
    variant = user_recipe(
        {
            "mine.yaml": "base: dreambooth_lora\nsources: {class_pictures: null}\n"
            "regularize: {prior: {kind: prior_prediction}}\nmodifier: {kind: learnable_token, vectors: 2}"
        },
        ELSEWHERE,
    )
    assert set(variant.sources) == {"references"} and variant.regularize["prior"].kind == "prior_prediction"
    assert variant.modifier.kind == "learnable_token" and variant.modifier.vectors == 2
    joined = user_recipe(
        {"mine.yaml": "base: textual_inversion\nsources: {more: {kind: folder, images: x}}"}, ELSEWHERE
    )
    assert set(joined.sources) == {"references", "more"}, "a part that a variant adds joins the existing ones"


def test_a_variant_overrides_the_phases_of_its_base(user_recipe: UserRecipe) -> None:
    """As on the command line, a setting also overrides the phases' settings. Otherwise, it would be silently lost."""
    text = "base: pivotal_tuning\ntrain: {steps: 7}\ntrainable: {lora: {rank: 2}}\nphases: {tune: {train: {steps: 9}}}"
    pivot, tune = dict(expand_phases(user_recipe({"mine.yaml": text}, ELSEWHERE))).values()
    assert (pivot.train.steps, tune.train.steps) == (7, 9)
    assert set(pivot.trainable) == {"tokens"} and tune.trainable["lora"].rank == 2


def test_the_overlay_is_applied_between_shipped_files_and_user_files(user_recipe: UserRecipe) -> None:
    shipped = load("dreambooth_lora")
    variant = user_recipe(
        {"mine.yaml": "base: dreambooth_lora\ntrain: {batch_size: 2}\ntrainable: {more: {kind: lora}}"}
    )
    assert variant.trainable["lora"] == shipped.trainable["lora"], "the overlay sets the toybox's learning rates"
    assert variant.trainable["more"].lr == shipped.trainable["lora"].lr, (
        "the overlay also sets the learning rates of parts that a variant adds"
    )
    assert (variant.train.batch_size, variant.train.steps) == (2, shipped.train.steps)
    assert user_recipe({"mine.yaml": "base: dreambooth_lora\ntrainable: {lora: {lr: 0.5}}"}).trainable["lora"].lr == 0.5
    faster = user_recipe({"mine.yaml": "base: pivotal_tuning\ntrainable: {lora: {lr: 0.5}}"})
    assert dict(expand_phases(faster))["tune"].trainable["lora"].lr == 0.5


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.yaml": "base: dreambooth_lra"}, "a.yaml: base = 'dreambooth_lra': unknown recipe.*'dreambooth_lora'"),
        ({"a.yaml": "base: gone.yaml"}, "a.yaml: base = 'gone.yaml': recipe file .*gone.yaml does not exist"),
        ({"a.yaml": "base: [x]"}, r"a.yaml: base = \['x'\]: give a recipe's name"),
        ({"a.yaml": "base: a.yaml"}, "a.yaml: base = 'a.yaml': .*circle: a.yaml → a.yaml"),
        (
            {"a.yaml": "base: b.yaml", "b.yaml": "base: c.yaml", "c.yaml": "base: b.yaml"},
            "c.yaml: base = 'b.yaml': .*circle: a.yaml → b.yaml → c.yaml → b.yaml",
        ),
        ({"a.yaml": "base: b.yaml", "b.yaml": "trane: {}"}, "^b.yaml: recipe: unknown key 'trane'"),
        ({"a.yaml": "base: b.yaml\ntrain: {stps: 3}", "b.yaml": "seed: 1"}, "^a.yaml: train: unknown key 'stps'"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "train: [1"}, "b.yaml is not readable YAML"),
        ({"a.yaml": "base: b.yaml", "b.yaml": "phases: {one: {train: {stps: 3}}}"}, "^b.yaml: phases.one: train: unk"),
    ],
)
def test_the_error_for_an_invalid_base_names_the_file_and_the_key(
    user_recipe: UserRecipe, files: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        user_recipe(files)


def test_a_base_may_be_set_only_in_a_file(user_recipe: UserRecipe) -> None:
    with pytest.raises(ValueError, match="unknown key 'base'"):
        user_recipe({"a.yaml": "seed: 1"}, "base=dreambooth_lora")


# --- which phases may be named ----------------------------------------------------------------


def test_the_command_line_may_name_only_existing_phases(user_recipe: UserRecipe) -> None:
    with pytest.raises(ValueError, match=r"phases\.tokens: unknown phase 'tokens'.*Available: pivot, tune\."):
        load("pivotal_tuning", ["phases.tokens.train.steps=5"])
    with pytest.raises(ValueError, match=r"phases\.tune: unknown phase 'tune'.*Available: none\."):
        load("textual_inversion", ["phases.tune.train.steps=5"])
    with pytest.raises(ValueError, match=r"phases\.tun: .*Did you mean 'tune'"):
        user_recipe({"mine.yaml": "base: pivotal_tuning"}, "phases.tun.train.steps=5")
    assert dict(expand_phases(load("pivotal_tuning", ["phases.tune.train.steps=5"])))["tune"].train.steps == 5


def test_a_variant_may_add_phases_that_set_trainable_or_task(user_recipe: UserRecipe) -> None:
    more = "base: pivotal_tuning\nphases: {last: {trainable: {lora: {rank: 2}}, train: {steps: 1}}}"
    assert list(dict(expand_phases(user_recipe({"mine.yaml": more})))) == ["pivot", "tune", "last"]
    with pytest.raises(ValueError, match=r"mine\.yaml: phases\.tun: unknown phase 'tun'\. Did you mean 'tune'"):
        user_recipe({"mine.yaml": "base: pivotal_tuning\nphases: {tun: {train: {steps: 5}}}"})
    assert user_recipe({"mine.yaml": "phases: {any: {train: {steps: 5}}}"}).phases, (
        "a file without a base defines its own phases"
    )


def test_null_removes_a_phase(user_recipe: UserRecipe) -> None:
    assert set(user_recipe({"mine.yaml": "base: pivotal_tuning\nphases: {pivot: null}"}).phases) == {"tune"}
    assert set(load("pivotal_tuning", ["phases.tune=null"]).phases) == {"pivot"}
    with pytest.raises(ValueError, match=r"phases\.tokens: unknown phase"):
        load("pivotal_tuning", ["phases.tokens=null"])
