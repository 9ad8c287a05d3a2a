"""The method families cover every shipped recipe, and every recipe setting is explained."""

from __future__ import annotations

import re

import pytest
import yaml
from pydantic import BaseModel

from shared.config import Part
from shared.io.trajectory_settings import Trajectory
from shared.recipe.catalog import recipe_files
from shared.recipe.explain import comments, explained
from shared.recipe.families import families
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load, model_of, written
from shared.recipe.schema import Recipe, Validation, dump
from shared.trainable.lora import Lora


@pytest.mark.parametrize("modality", ["image", "video", "3d"])
def test_every_recipe_belongs_to_exactly_one_family(modality):
    members = [name for family in families(modality).values() for name in family.recipes]
    assert sorted(members) == sorted(recipe_files(modality))


@pytest.mark.parametrize("modality", ["image", "video", "3d"])
def test_each_setting_that_a_family_lists_occurs_in_at_least_one_of_its_recipes(modality):
    for family in families(modality).values():
        recipes = [written(name, modality, model_of(modality)) for name in family.recipes]
        dumps = [
            dump(recipe) | ({"phases": {n: dump(p) for n, p in expand_phases(recipe)}} if recipe.phases else {})
            for recipe in recipes
        ]
        dumps += [dump(phase) for recipe in recipes for _, phase in expand_phases(recipe)]
        for key in family.settings:
            assert any(_has(data, key.split(".")) for data in dumps), key


def _has(data, path):
    return not path or (isinstance(data, dict) and path[0] in data and _has(data[path[0]], path[1:]))


@pytest.mark.parametrize(("modality", "name"), [("video", "motion_director"), ("3d", "magic3d")])
def test_explanations_do_not_change_a_recipe(modality, name):
    recipe = load(name, [], modality, model_of(modality))
    assert yaml.safe_load(explained(recipe, dump(recipe))) == dump(recipe)


def test_settings_are_explained_by_the_docstrings_of_their_classes():
    recipe = load("t_lora", [], "image", model_of("image"))
    lines = explained(recipe, dump(recipe)).splitlines()
    (line,) = [line for line in lines if line.strip().startswith("min_rank:")]
    assert "# rank at full noise; if null, " in line
    first = (Lora.__doc__ or "").strip().splitlines()[0]
    assert f"    # {first}" in lines


@pytest.mark.parametrize("modality", ["image", "video", "3d"])
def test_every_setting_of_every_recipe_is_explained(modality):
    without = {
        place
        for name in recipe_files(modality)
        for recipe in [load(name, [], modality, model_of(modality))]
        for place in _unexplained(recipe, dump(recipe))
    }
    assert not without


def _unexplained(model, data):
    """Yields `Class.setting` for each unexplained setting, and the name of each part class without a docstring.

    A setting is explained if it has a comment, or if its class's docstring mentions it in backticks or as "setting: …".
    """
    own = isinstance(model, BaseModel)
    notes = comments(type(model)) if own else {}
    about = " ".join(c.__doc__ or "" for c in type(model).__mro__ if own and issubclass(c, Part))
    for key, value in data.items():
        part = getattr(model, key, None) if own else model.get(key)
        if isinstance(value, dict) and value and isinstance(part, BaseModel | dict):
            if isinstance(part, BaseModel) and not type(part).__doc__:
                yield type(part).__name__
            yield from _unexplained(part, value)
        elif own and key not in notes and not re.search(rf"`[^`]*\b{key}\b[^`]*`|\b{key}:", about):
            if key == "kind" and not isinstance(model, Recipe):
                continue  # the part's docstring explains it
            yield f"{type(model).__name__}.{key}"


def test_explanations_use_yaml_values_instead_of_python_values():
    for modality in ("image", "video", "3d"):
        for name in recipe_files(modality):
            recipe = load(name, [], modality, model_of(modality))
            said = re.findall(r"# (.*)", explained(recipe, dump(recipe)))
            assert not [words for words in said if re.search(r"\b(None|True|False):|\(\):", words)], name


def test_a_comment_above_a_setting_explains_it():
    assert (
        comments(Trajectory)["points"]
        == "one per frame, relative to their mean; if empty, the points are measured from the clips"
    )
    prompts = ["a {concept} " * 9, "b {concept} " * 9]
    lines = explained(Validation(prompts=tuple(prompts)), {"prompts": prompts}).splitlines()
    assert lines[0] == "# prompts to generate from; {concept} stands for the concept's words"
