"""A run warns about a missing class noun, which could otherwise worsen the result for no apparent reason."""

from __future__ import annotations

import warnings

import pytest

from shared.recipe.resolve import load
from shared.runner.plan import plan


def warned(photos, tmp_path, recipe, *settings):
    pictures = [f"subject.images={photos}"] if not any("subjects." in s for s in settings) else []
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        plan(load(recipe, [*pictures, *settings, f"output={tmp_path / 'rex.concept'}"]))
    return [str(w.message) for w in found if "class noun" in str(w.message)]


def test_a_subject_without_a_class_noun_is_reported_with_the_key_to_set(photos, tmp_path):
    (message,) = warned(photos, tmp_path, "t_lora")
    assert message.startswith("'rex' has no class noun: set subject.class_noun to a plain word")
    assert not warned(photos, tmp_path, "t_lora", "subject.class_noun=mug")
    two = (f"subjects.a.images={photos}", f"subjects.b.images={photos}", "subjects.a.class_noun=mug")
    (message,) = warned(photos, tmp_path, "t_lora", *two)
    assert message.startswith("'b' has no class noun: set subjects.b.class_noun")


@pytest.mark.parametrize(("recipe", "settings"), [("textual_inversion", ()), ("t_lora", ("kind=style",))])
def test_recipes_that_do_not_put_the_class_noun_in_captions_give_no_warning(photos, tmp_path, recipe, settings):
    assert not warned(photos, tmp_path, recipe, *settings)
