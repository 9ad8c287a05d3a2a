"""The shipped video recipes can be resolved, name their papers, and appear in `pcs methods`."""

from __future__ import annotations

import pytest

from pcs_video.recipe import VideoRecipe
from shared.cli import build, run
from shared.config import validate
from shared.recipe.catalog import recipe_files
from shared.recipe.resolve import load, model_of, written
from shared.recipe.schema import dump

SHIPPED = sorted(recipe_files("video"))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_resolves_and_survives_a_round_trip(name: str) -> None:
    recipe = load(name, (), "video", VideoRecipe)
    assert validate(VideoRecipe, dump(recipe)) == recipe
    full = written(name, "video", VideoRecipe)
    assert full.papers and full.title and recipe_files("video")[name].read_text().startswith("# ")
    assert all(paper.startswith("https://arxiv.org/abs/") for paper in full.papers)
    assert recipe.train.steps <= full.train.steps  # on the toybox, recipes need fewer steps


def test_motion_recipes_train_motion_modules_on_the_toybox_too() -> None:
    """For pictures, the toybox overlay puts LoRAs on all kinds of layers. This rule does not apply to clips."""
    recipe = load("motion_director", (), "video", VideoRecipe)
    assert recipe.trainable["temporal"].places == ("temporal_attention", "temporal_feed_forward")
    assert recipe.train.resolution == 64 and recipe.sampling.steps == 25


def test_pcs_methods_lists_and_shows_video_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert model_of("video") is VideoRecipe
    assert run(build(), ["methods"]) == 0
    listed = capsys.readouterr().out
    assert "video: A motion separated from appearance (test-time fine-tuning)" in listed and all(
        name in listed for name in SHIPPED
    )
    assert run(build(), ["methods", "show", "motion_director"]) == 0
    shown = capsys.readouterr().out
    assert "appearance_debias" in shown and "per_source: true" in shown
    assert run(build(), ["methods", "show", "motion_director", "--modality", "sound"]) != 0


def test_an_image_recipe_refuses_clips(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"unknown key 'clips'"):
        load("dreambooth_lora", ("subject.clips=clips",))
