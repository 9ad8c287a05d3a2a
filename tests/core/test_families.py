"""The families of methods cover every shipped recipe, and what they say is true."""

from __future__ import annotations

import pytest
import yaml

from shared.recipe.catalog import recipe_files
from shared.recipe.explain import explained
from shared.recipe.families import families
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load, model_of, written
from shared.recipe.schema import dump
from shared.trainable.lora import Lora


@pytest.mark.parametrize("modality", ["image", "video", "3d"])
def test_every_recipe_belongs_to_one_family(modality):
    members = [name for family in families(modality).values() for name in family.recipes]
    assert sorted(members) == sorted(recipe_files(modality))


@pytest.mark.parametrize("modality", ["image", "video", "3d"])
def test_the_settings_that_matter_are_keys_of_its_recipes(modality):
    for family in families(modality).values():
        recipes = [written(name, modality, model_of(modality)) for name in family.recipes]
        dumps = [dump(phase) for recipe in recipes for phase in (recipe, *(p for _, p in expand_phases(recipe)))]
        for key in family.settings:
            assert any(_has(data, key.split(".")) for data in dumps), key


def _has(data, path):
    return not path or (isinstance(data, dict) and path[0] in data and _has(data[path[0]], path[1:]))


@pytest.mark.parametrize(("modality", "name"), [("video", "motion_director"), ("3d", "magic3d")])
def test_the_explained_recipe_is_still_the_same_recipe(modality, name):
    recipe = load(name, [], modality, model_of(modality))
    assert yaml.safe_load(explained(recipe, dump(recipe))) == dump(recipe)


def test_settings_are_explained_by_their_classes_docstrings():
    recipe = load("t_lora", [], "image", model_of("image"))
    lines = explained(recipe, dump(recipe)).splitlines()
    (line,) = [line for line in lines if line.strip().startswith("min_rank:")]
    assert line.endswith("# rank at full noise; null: the rank is the same at all times")
    first = (Lora.__doc__ or "").strip().splitlines()[0]
    assert f"    # {first}" in lines
