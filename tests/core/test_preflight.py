"""Tests that missing files are reported before a model is loaded, not when the phase that reads them starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.runner.plan import plan
from tests.core.runs import SMALL, finish, paint, session, small

BARE = "no picture has one: put masks in masks/"
LOCALISATION = "regularize.localisation.weight=0.1"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder of pictures without masks."""
    folder = paint(tmp_path_factory.mktemp("bare") / "photos")
    shutil.rmtree(folder / "masks")
    return folder


def refused(recipe: str, settings: tuple[str, ...], tiny: Any, folder: Path, work: Path, match: str) -> None:
    """Asserts that the plan, which loads no model, and a run without a plan both refuse these settings."""
    given = (f"subject.images={folder}", "subject.class_noun=mug", f"output={work / 'mug.concept'}")
    with pytest.raises(ValueError, match=match):
        plan(load(recipe, [*SMALL, *given, *settings]))
    with pytest.raises(ValueError, match=match):
        session(tiny(), small(recipe, *settings), folder, work / "run")
    assert not (work / "run").exists()


@pytest.mark.parametrize(
    ("recipe", "setting"),
    [
        ("textual_inversion", LOCALISATION),
        ("pivotal_tuning", "phases.tune.regularize.localisation.weight=0.1"),
    ],
)
def test_missing_masks_that_a_penalty_needs_are_reported(recipe, setting, tiny, bare, tmp_path):
    refused(recipe, (setting,), tiny, bare, tmp_path, rf"regularize\.localisation .* {BARE}")


def test_one_mask_is_enough_for_a_penalty_unless_the_recipe_requires_a_mask_for_every_picture(
    tiny, photos, bare, tmp_path
):
    folder = Path(shutil.copytree(bare, tmp_path / "some"))
    (folder / "masks").mkdir()
    shutil.copy(photos / "masks" / "0.png", folder / "masks" / "0.png")
    asked = ("train.batch_size=1", "train.steps=3", "trainable.tokens.lr=0.1")
    finish(session(tiny(), small("textual_inversion", LOCALISATION, *asked), folder, tmp_path / "run"))
    required = ("masks.given.require=true",)
    refused("textual_inversion", required, tiny, folder, tmp_path / "no", "1.png has no mask, but this recipe requires")


def test_a_missing_folder_of_pictures_is_reported(tiny, photos, tmp_path):
    missing = tmp_path / "nowhere"
    for recipe, place in (("dreambooth_lora", "sources"), ("pivotal_tuning", "phases.tune.sources")):
        settings = (f"{place}.mine.kind=folder", f"{place}.mine.images={missing}")
        refused(recipe, settings, tiny, photos, tmp_path, r"sources\.mine: .*nowhere")


def test_class_pictures_need_a_class_noun(tiny, photos, tmp_path):
    subjects = {"mug": read_subject(photos)}
    recipe = small("dreambooth_lora", "modifier.kind=plain_text", "modifier.words=sks")
    with pytest.raises(ValueError, match=r"sources\.class_pictures: class pictures use .*'mug' has no"):
        session(tiny(), recipe, photos, tmp_path / "run", subjects=subjects)


def test_pictures_from_a_phase_that_does_not_come_earlier_are_refused(tiny, photos, tmp_path):
    settings = ("phases.tune.sources.made.kind=phase_pictures", "phases.tune.sources.made.phase=tune")
    refused("pivotal_tuning", settings, tiny, photos, tmp_path, r"sources\.made: .*'tune'.* Available: pivot")


def test_a_picture_of_two_subjects_needs_a_mask_for_each(tiny, photos, bare, tmp_path):
    scene = bare / "0.png"
    masked = read_subject(scene, "mug", masks={scene: photos / "masks" / "0.png"})
    subjects = {"mug": masked, "rex": read_subject(scene, "dog")}
    recipe = small("textual_inversion", "sources.references=null", "sources.scene.kind=scene")
    with pytest.raises(ValueError, match=r"sources\.scene: .*0.png shows mug and rex, but 'rex' has no mask"):
        session(tiny(), recipe, bare, tmp_path / "run", subjects=subjects)
