"""Tests the shipped recipes, the precedence of settings from different layers, and phases."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

import shared.recipe.overlay
from shared.config import read_yaml, slots, validate
from shared.noise.times import Uniform
from shared.recipe.catalog import config_folder, recipe_files
from shared.recipe.overlay import Rules
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load, written
from shared.recipe.schema import Recipe, dump
from shared.recipe.taxonomy import taxonomy_of

SHIPPED = sorted(recipe_files("image"))
ELSEWHERE = "backbone=some/folder"


def phases(recipe: Recipe) -> dict[str, Recipe]:
    return dict(expand_phases(recipe))


@pytest.fixture
def user_recipe(tmp_path):
    """Returns a function that writes a user's recipe file and loads it."""

    def make(text: str, *overrides: str) -> Recipe:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return load(str(path), [ELSEWHERE, *overrides])

    return make


TWO = """
trainable: {tokens: {lr: 1.0e-3}}
modifier: {kind: learnable_token}
regularize: {anchor: {kind: embedding_anchor, weight: 0.1}}
train: {steps: 10, batch_size: 2}
phases:
  first: {train: {steps: 4}}
  second:
    trainable: {lora: {rank: 16, lr: 1.0e-4}}
    regularize: {anchor: null, prior: {kind: prior_prediction, weight: 1.0}}
    train: {steps: 6}
"""


# --- shipped recipes ------------------------------------------------------------------------


def test_the_classic_recipes_are_shipped():
    assert {"textual_inversion", "dreambooth_lora", "pivotal_tuning"} <= set(SHIPPED)


@pytest.mark.parametrize("place", [[], [ELSEWHERE]], ids=["toybox", "elsewhere"])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_resolves_and_can_be_dumped_and_read_again(name, place):
    recipe = load(name, place)
    assert recipe.method == name
    assert validate(Recipe, json.loads(json.dumps(dump(recipe)))) == recipe
    assert validate(Recipe, yaml.safe_load(yaml.safe_dump(dump(recipe)))) == recipe
    for phase in phases(recipe).values():
        assert phase.trainable and phase.train.steps > 0 and not phase.phases


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_links_to_its_papers_at_the_top_and_has_a_taxonomy(name):
    lines = recipe_files("image")[name].read_text().splitlines()
    head = "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])
    data, recipe = read_yaml(recipe_files("image")[name]), written(name)
    assert "https://" in "".join(head.splitlines()[:2]) and recipe.title
    assert recipe.papers and all(p in head for p in data.get("papers", ()))
    place = taxonomy_of(recipe)
    assert place.modifier and place.trains


def test_the_taxonomy_of_a_recipe_follows_from_its_parts(user_recipe):
    text = """
taxonomy: {concept: [face], augmentation: in my own words}
modifier: {kind: learnable_token, vectors: 3}
prompts: {templates: ["a {concept}"], drop: 0.1}
masks: {grow: {by: 2}}
objective: {masked: true}
augment: {random_resize: {}}
phases:
  first: {trainable: {tokens: {}}}
  second:
    trainable: {lora: {dora: true, roles: [cross_attention.kv]}}
    prompts: {set: subject, templates: [], drop: 0.0}
    regularize: {near: {kind: prior_prediction}}
"""
    place = taxonomy_of(user_recipe(text))
    assert (place.scheme, place.concept, place.modifier) == ("test-time fine-tuning", ("face",), "learnable tokens")
    assert place.trains == "token embeddings, then DoRA on cross-attention K/V"
    assert place.prompt_engineering == "one template, some empty, template captions"
    assert (place.mask, place.regularization) == ("grown masks, masked loss", "prior prediction")
    assert place.augmentation == "in my own words", "the wording in the file is kept"


def test_the_classic_recipes_contain_the_parts_that_define_their_methods():
    inversion, dreambooth, pivotal = (
        load(n, [ELSEWHERE]) for n in ("textual_inversion", "dreambooth_lora", "pivotal_tuning")
    )
    assert set(inversion.trainable) == {"tokens"} and inversion.modifier.kind == "learnable_token"
    assert dreambooth.modifier.kind == "rare_token" and dreambooth.regularize["prior"].kind == "prior_preservation"
    pivot, tune = phases(pivotal).values()
    assert set(pivot.trainable) == {"tokens"} and set(tune.trainable) == {"tokens", "lora"}
    assert not pivot.regularize and tune.regularize["prior"].kind == "prior_prediction"


# --- finding recipes ---------------------------------------------------------------------------------


def test_the_error_for_an_unknown_recipe_lists_all_recipes_and_suggests_the_nearest_name():
    with pytest.raises(
        ValueError, match="unknown recipe 'dreambooth_lra'.*Did you mean 'dreambooth_lora'.*textual_inversion"
    ):
        load("dreambooth_lra")
    with pytest.raises(ValueError, match="recipe file gone.yaml does not exist"):
        load("gone.yaml")
    with pytest.raises(ValueError, match="unknown recipe"):
        load(str(config_folder()))


def test_a_path_loads_the_same_recipe_as_its_name():
    path = recipe_files("image")["dreambooth_lora"]
    assert load(str(path)) == load("dreambooth_lora")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trane: {steps: 3}", "mine.yaml: recipe: unknown key 'trane'. Did you mean 'train'?"),
        ("train: {step: 3}", "train: unknown key 'step'. Did you mean 'steps'?"),
        ("trainable: {lora: {rnk: 3}}", "trainable.lora: unknown key 'rnk'. Did you mean 'rank'?"),
        ("trainable: {x: {kind: lorra}}", "trainable.x: unknown kind 'lorra'. Did you mean 'lora'?"),
        ("trainable: {lora.a: {rank: 3}}", "trainable: 'lora.a' cannot be a part's name"),
        ("trainable: [lora]", "trainable"),
        ("phases: 3", "phases = 3"),
        ("phases: [a, b]", "phases"),
        ("phases: {a: 3}", "phases.a = 3"),
        ("train: 3", "train = 3"),
        ("seed: -1", "seed = -1"),
        ("train: {optimizers: {main: {betas: [0.9, 1.5]}}}", "train.optimizers.main.betas.1 = 1.5"),
        ("name: a b", "name = 'a b'"),
        ("noise: {low: 0.5, high: 0.2}", "low = 0.5 must be below high = 0.2"),
        ("prompts: {templates: [a photo]}", "has no {concept}"),
    ],
)
def test_the_error_for_a_wrong_setting_names_the_setting(user_recipe, text, message):
    with pytest.raises(ValueError) as error:
        user_recipe(text)
    assert message in str(error.value)


def test_wrong_missing_and_conflicting_settings_on_the_command_line_are_refused():
    with pytest.raises(ValueError, match=r"train\.steps = 'many'"):
        load("dreambooth_lora", ["train.steps=many"])
    with pytest.raises(ValueError, match=r"subject\.images is required"):
        load("dreambooth_lora", ["subject.class_noun=mug"])
    with pytest.raises(ValueError, match="either subject"):
        load("dreambooth_lora", ["subject.images=a", "subjects.b.images=b"])


# --- layers ----------------------------------------------------------------------------------


def test_the_toybox_overlay_applies_only_to_the_toybox():
    on_toybox = load("dreambooth_lora")
    elsewhere = load("dreambooth_lora", [ELSEWHERE])
    plain = validate(Recipe, {**read_yaml(recipe_files("image")["dreambooth_lora"]), "method": "dreambooth_lora"})
    assert elsewhere == plain.model_copy(update={"backbone": "some/folder"})
    assert on_toybox.train.resolution == 64 and elsewhere.train.resolution is None
    assert on_toybox.trainable["lora"] != elsewhere.trainable["lora"]
    assert on_toybox.trainable["lora"].rank == elsewhere.trainable["lora"].rank


def test_each_overlay_rule_applies_only_to_what_it_names(user_recipe, tmp_path, monkeypatch):
    rules = {
        "common": {"train": {"steps": 7, "batch_size": 3}},
        "by_kind": {"trainable": {"lora": {"lr": 0.5}, "tokens": {"lr": 0.25}}},
        "recipes": {"mine": {"train": {"batch_size": 4}}, "other": {"seed": 9}},
    }
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "toybox.yaml").write_text(yaml.safe_dump(rules))
    monkeypatch.setattr(shared.recipe.overlay, "config_folder", lambda: tmp_path)
    phases_text = "{a: {trainable: {t: {kind: tokens}}}, b: {train: {steps: 2}}}"
    text = "trainable: {first: {kind: lora}, lora: {rank: 2}}\nphases: " + phases_text
    recipe = user_recipe(text, "backbone=toybox")
    assert [recipe.trainable[k].lr for k in ("first", "lora")] == [0.5, 0.5] and recipe.trainable["lora"].rank == 2
    assert (recipe.train.steps, recipe.train.batch_size, recipe.seed) == (7, 3, 0), (
        "rules under `recipes` apply only to shipped recipes"
    )
    assert Rules.read("toybox", "image", {}).of(read_yaml(tmp_path / "mine.yaml"), ["mine"])["train"] == {
        "steps": 7,
        "batch_size": 4,
    }
    a, b = phases(recipe).values()
    assert a.trainable["t"].lr == 0.25 and set(b.trainable) == {"first", "lora"}
    assert (a.train.steps, b.train.steps) == (7, 2), "a phase overrides the common settings"
    assert user_recipe(text, "backbone=toybox", "trainable.lora.lr=0.125").trainable["lora"].lr == 0.125
    assert user_recipe(text).train.batch_size == 1


def test_a_user_recipe_overrides_the_overlay(user_recipe):
    """The recipe's own rates, roles, batch size and prompts are kept. The overlay sets what the recipe leaves out."""
    text = """
trainable: {lora: {lr: 3.0e-4, roles: [cross_attention]}, second: {kind: lora, rank: 2}, tokens: {}}
train: {batch_size: 2, validation: {every: 7, prompts: ["a {concept}"]}}
phases:
  one: {trainable: {lora: {rank: 2}}}
  two: {trainable: {more: {kind: tokens, lr: 0.5}, last: {kind: lora}}}
"""
    recipe = user_recipe(text, "backbone=toybox")
    assert recipe.trainable["lora"].lr == 3e-4 and recipe.trainable["lora"].roles == ("cross_attention",)
    assert (recipe.train.batch_size, recipe.train.validation.every) == (2, 7) and recipe.train.resolution == 64
    assert recipe.train.validation.prompts == ("a {concept}",) and list(recipe.trainable) == [
        "lora",
        "second",
        "tokens",
    ]
    shipped = load("dreambooth_lora").trainable["lora"]
    assert recipe.trainable["second"].lr == shipped.lr and recipe.trainable["second"].roles == shipped.roles
    one, two = phases(recipe).values()
    assert one.trainable["lora"].lr == 3e-4 and one.trainable["lora"].rank == 2, (
        "the recipe's top-level settings override the overlay"
    )
    assert two.trainable["more"].lr == 0.5 and two.trainable["last"].lr == shipped.lr
    assert user_recipe(text, "backbone=toybox", "trainable.second.lr=0.25").trainable["second"].lr == 0.25


def test_the_overlay_applies_to_parts_set_on_the_command_line(user_recipe):
    shipped = load("dreambooth_lora").trainable["lora"]
    added = load("textual_inversion", ["trainable.lora.rank=4"]).trainable["lora"]
    assert (added.rank, added.lr, added.roles) == (4, shipped.lr, shipped.roles)
    assert load("textual_inversion", ["trainable.lora.lr=0.5"]).trainable["lora"].lr == 0.5
    swapped = load("textual_inversion", ["trainable.tokens.kind=lora"]).trainable["tokens"]
    assert swapped.kind == "lora" and swapped.lr == shipped.lr
    assert (
        user_recipe("trainable: {x: {kind: tokens}}", "backbone=toybox", "trainable.x.kind=lora").trainable["x"].lr
        == shipped.lr
    )


@pytest.mark.parametrize("turn", [1, -1], ids=["as given", "reversed"])
def test_overrides_work_in_any_order_even_if_one_of_them_sets_the_kind(user_recipe, turn):
    def loaded(*overrides: str) -> Recipe:
        return user_recipe("regularize: {prior: {kind: embedding_anchor}}", *overrides[::turn])

    assert loaded("trainable.x.lr=0.5", "trainable.x.kind=tokens").trainable["x"].lr == 0.5
    assert loaded("regularize.prior.weight=5", "regularize.prior.kind=prior_prediction").regularize["prior"].weight == 5
    assert loaded("noise.offset=0.1", "noise.kind=uniform").noise.offset == 0.1
    noise = loaded("noise.offset=0.1", "noise.kind=logit_normal", "noise.std=2").noise
    assert (noise.kind, noise.offset, noise.std) == ("logit_normal", 0.1, 2)
    assert user_recipe("noise: {offset: 0.2}", "noise.kind=uniform").noise.offset == 0.2, (
        "an override that does not change the kind drops no settings"
    )
    assert user_recipe("prompts: {set: style}", "prompts.kind=templates").prompts.set == "style"


def test_the_kind_of_a_part_can_be_changed_in_a_phase_and_on_the_command_line(user_recipe):
    text = "noise: {offset: 0.2}\nphases: {a: {noise: {kind: uniform}}, b: {noise: {kind: logit_normal, std: 2}}}"
    a, b = phases(user_recipe(text)).values()
    assert a.noise.offset == 0.2 and b.noise.std == 2
    a, b = phases(user_recipe(text, "noise.offset=0.3")).values()
    assert (a.noise.offset, b.noise.offset, b.noise.std) == (0.3, 0.3, 2)
    a, b = phases(user_recipe(text, "noise.kind=uniform")).values()
    assert b.noise.kind == "uniform" == a.noise.kind and a.noise.offset == 0.2


def test_the_command_line_overrides_the_file():
    recipe = load("dreambooth_lora", ["train.steps=3", "trainable.lora.rank=2", "regularize.prior.weight=0.5"])
    assert (recipe.train.steps, recipe.trainable["lora"].rank, recipe.regularize["prior"].weight) == (3, 2, 0.5)
    other = load("dreambooth_lora", ["regularize.prior.kind=prior_prediction", "sources.class_pictures=null"])
    assert other.regularize["prior"].kind == "prior_prediction" and set(other.sources) == {"references"}


def test_a_slot_that_contains_a_single_part_needs_no_kind(user_recipe):
    noise = user_recipe("seed: 1", "noise.offset=0.1").noise
    assert noise == Uniform(offset=0.1)
    assert user_recipe("seed: 1", "modifier.token=ohwx").modifier.token == "ohwx"
    assert user_recipe("seed: 1", "noise.kind=logit_normal", "noise.shift=3").noise.shift == 3


def test_an_added_source_is_used_alongside_the_references(user_recipe):
    recipe = user_recipe("seed: 1", "regularize.prior.kind=prior_preservation", "sources.class_pictures.kind=generated")
    assert set(recipe.sources) == {"references", "class_pictures"}


def test_prior_preservation_without_class_pictures_is_an_error(user_recipe):
    with pytest.raises(ValueError, match=r"regularize\.prior needs class pictures: add sources"):
        user_recipe("regularize: {prior: {kind: prior_preservation}}")
    with pytest.raises(ValueError, match=r"phases\.b: .*regularize\.prior needs class pictures"):
        user_recipe("phases: {a: {}, b: {regularize: {prior: {kind: prior_preservation}}}}")
    assert user_recipe(
        "regularize: {prior: {kind: prior_preservation}}\nsources: {references: {}, mine: {kind: folder, images: x}}"
    )


# --- phases ----------------------------------------------------------------------------------


def test_a_recipe_without_phases_is_one_phase(user_recipe):
    recipe = user_recipe("trainable: {lora: {}}")
    assert phases(recipe) == {"tune": recipe}
    assert user_recipe(TWO, "phases=null").phases == {} and user_recipe(TWO, "regularize=null").regularize == {}
    assert set(phases(user_recipe("train: {steps: 3}\nphases:\n  one:\n  two: {train: {steps: 4}}"))) == {"one", "two"}


def test_a_phase_is_merged_over_the_recipe(user_recipe):
    first, second = phases(user_recipe(TWO)).values()
    assert set(first.trainable) == {"tokens"} and set(second.trainable) == {"tokens", "lora"}
    assert set(first.regularize) == {"anchor"} and set(second.regularize) == {"prior"}, "null removes a part"
    assert (first.train.steps, second.train.steps, second.train.batch_size) == (4, 6, 2)
    assert first.modifier == second.modifier


def test_the_command_line_overrides_a_phase(user_recipe):
    first, second = phases(user_recipe(TWO, "train.steps=1", "train.batch_size=5")).values()
    assert (first.train.steps, second.train.steps, first.train.batch_size) == (1, 1, 5)
    first, second = phases(user_recipe(TWO, "phases.second.train.steps=1")).values()
    assert (first.train.steps, second.train.steps) == (4, 1)


def test_a_setting_of_a_part_applies_only_to_the_phases_that_have_the_part(user_recipe):
    first, second = phases(user_recipe(TWO, "trainable.lora.rank=2", "regularize.prior.weight=0.5")).values()
    assert set(first.trainable) == {"tokens"} and second.trainable["lora"].rank == 2
    assert second.trainable["lora"].lr == 1e-4 and second.regularize["prior"].weight == 0.5
    assert set(first.regularize) == {"anchor"}
    shipped = phases(load("pivotal_tuning", ["regularize.prior.weight=0.5", "trainable.lora.dora=true"]))
    assert shipped["tune"].regularize["prior"].weight == 0.5 and shipped["tune"].trainable["lora"].dora
    assert set(shipped["pivot"].trainable) == {"tokens"}


def test_an_override_does_not_restore_a_part_that_a_phase_removes(user_recipe):
    first, second = phases(user_recipe(TWO, "regularize.anchor.weight=0.7")).values()
    assert first.regularize["anchor"].weight == 0.7 and "anchor" not in second.regularize


def test_the_command_line_can_change_the_kind_of_a_part_in_a_phase(user_recipe):
    text = TWO.replace("prior: {kind: prior_prediction, weight: 1.0}", "prior: {kind: prior_prediction, weight: 3.0}")
    second = phases(user_recipe(text, "regularize.prior.kind=embedding_anchor"))["second"]
    assert second.regularize["prior"].kind == "embedding_anchor" and second.regularize["prior"].weight == 1e-5
    assert "prior" not in phases(user_recipe(text, "regularize.prior=null"))["second"].regularize


def test_a_new_part_is_added_to_every_phase(user_recipe):
    first, second = phases(user_recipe(TWO, "trainable.more.kind=lora", "trainable.more.rank=2")).values()
    assert first.trainable["more"].rank == second.trainable["more"].rank == 2


def test_a_wrong_setting_in_a_phase_is_reported_when_the_recipe_is_loaded(user_recipe):
    with pytest.raises(ValueError, match=r"phases\.second: trainable\.lora: unknown key 'rnk'. Did you mean 'rank'"):
        user_recipe(TWO.replace("rank: 16", "rnk: 16"))
    with pytest.raises(ValueError, match=r"phases\.first: train\.steps = -1"):
        user_recipe(TWO, "phases.first.train.steps=-1")


@pytest.mark.parametrize("key", ["modifier: {kind: plain_text}", "backbone: x", "phases: {}", "name: x"])
def test_settings_shared_by_all_phases_cannot_be_set_in_a_single_phase(user_recipe, key):
    with pytest.raises(ValueError, match=r"phases\.a\." + key.split(":")[0] + ": all phases share this setting"):
        user_recipe(f"phases: {{a: {{{key}}}}}")


def test_slots_are_found_by_their_type():
    assert set(slots(Recipe)) == {"sources", "masks", "augment", "attention", "trainable", "regularize"}


def test_path_settings_are_loaded_as_path_objects():
    recipe = load("dreambooth_lora", ["subject.images=photos/", "output=a/b.concept", "subject.class_noun=mug"])
    assert recipe.subject is not None and recipe.subject.images == Path("photos")
    assert recipe.output == Path("a/b.concept")
    assert validate(Recipe, dump(recipe)) == recipe
