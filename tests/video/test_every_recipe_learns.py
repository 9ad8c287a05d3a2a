"""Every shipped video recipe learns a concept on a tiny model and saves it.

The recipes are limited to two steps. They must leave the model's own weights unchanged.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.backbones import load_backbone
from shared.concept import read
from shared.recipe.catalog import recipe_files
from shared.recipe.resolve import load
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sampling.settings import SamplingSettings
from tests.core.runs import CLASS, paint

SHORT = "sources.clips.window.length=4"
_PICTURES = ("pictures.num_images=2", "pictures.steps=1")
_CLIPS = ("num_images=2", "steps=1", "frames=4")
#: Settings that adapt each recipe to a tiny model.
SMALL: dict[str, tuple[str, ...]] = {
    "animatediff_motion_lora": (SHORT,),
    "customcrafter": (
        "sources.references.length=4",
        "sources.class_pictures.length=4",
        *(f"sources.class_pictures.{s}" for s in _PICTURES),
    ),
    "dreamvideo": (),
    "dreamvideo_motion": (SHORT,),
    "motion_booth": tuple(f"sources.class_pictures.{s}" for s in _CLIPS),
    "motion_director": (SHORT,),
    "motion_director_joint": (SHORT,),
    "motion_trajectory": (SHORT, "train.steps=0"),
    "motion_inversion": (SHORT, "trainable.embeddings.frames=4", "trainable.embeddings.resolution=32"),
    "set_then_sequence": (SHORT,),
    "still_moving": (
        "phases.pictures.task.num=2",
        *(f"sources.class_stills.{s}" for s in ("length=4", *_PICTURES)),
        "sources.stills.length=4",
        *(f"sources.class_clips.{s}" for s in _CLIPS),
        *CLASS,
    ),
    "subject_lora": CLASS,
    "synmotion": (SHORT, *(f"sources.{s}.{c}" for s in ("people", "animals") for c in _CLIPS)),
    "tune_a_video": (SHORT,),
}
FOR_ALL = ("train.steps=2", "train.batch_size=1", "train.resolution=32", "sampling.steps=2", "preview.num=0")
SETTINGS = SamplingSettings("", 3.0, 2, height=32, width=32, frames=4)
#: The parts that remain in the concept, for recipes that discard some of their trained parts.
KEPT = {
    "still_moving": {"lora", "spatial"},
    "motion_director": {"temporal"},
    "motion_director_joint": {"temporal"},
}


def test_every_shipped_recipe_is_covered() -> None:
    assert SMALL.keys() == recipe_files("video").keys()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("given") / "photos")


def weights(runner: VideoRunner) -> dict[str, Tensor]:
    networks = {**runner.backbone.components, "vae": runner.backbone.vae}
    return {f"{c}.{key}": value.clone() for c, m in networks.items() for key, value in m.state_dict().items()}


def shown(runner: VideoRunner) -> Tensor:
    return runner.generate(["a photo of a <thing> on the beach"], [0], SETTINGS)


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_recipe_learns_and_saves_a_concept(
    name: str, clip_model: Path, clip_folder: Path, photos: Path, tmp_path: Path
) -> None:
    takes_clips = SHORT in SMALL[name]
    # the noise prior looks for the clips next to the concept
    clips = shutil.copytree(clip_folder, tmp_path / "clips")
    given = f"subject.clips={clips}" if takes_clips else f"subject.images={photos}"
    settings = [f"backbone={clip_model}", f"output={tmp_path / 'thing.concept'}", given, "subject.class_noun=mug"]
    recipe: Any = load(name, [*settings, *FOR_ALL, *SMALL[name]], "video", VideoRecipe)
    runner = open_runner(VideoRunner, recipe.backbone, [], "cpu", **recipe.opening())
    before = weights(runner)
    personalize(plan(recipe), runner)
    made = shown(runner)
    runner.unload("thing")
    after = weights(runner)
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    concept = read(tmp_path / "thing.concept")
    parts = {*concept.meta.adapters, *concept.meta.weights, *concept.meta.branches}
    trained = {
        s for phase in (recipe, *_phases(recipe)) for s, part in phase.trainable.items() if part.kind != "tokens"
    }
    assert parts == KEPT.get(name, trained) and (parts <= trained)
    fresh = VideoRunner(load_backbone(clip_model))
    fresh.load(concept)
    assert torch.equal(shown(fresh), made)  # the saved concept reproduces the clip
    with fresh.backbone.active({}):
        without = fresh.make([fresh.backbone.placeholders["thing"].words or "a"], [0], SETTINGS)
        assert torch.isfinite(made).all() and without.shape == made.shape
    fresh.unload("thing")
    fresh.load(concept, 0.0)
    assert not torch.equal(shown(fresh), made)


def _phases(recipe: Any) -> list[Any]:
    from shared.recipe.phases import expand_phases

    return [phase for _, phase in expand_phases(recipe)]
