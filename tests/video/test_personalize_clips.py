"""Tests the public interface for learning motions and subjects, and for using both in clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_image.runner import ImageRunner
from pcs_video.clips import ClipFiles, generate
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.backbones import load_backbone
from shared.concept import read
from shared.io.clips.clip_metadata import read_clip_metadata
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.recipe.resolve import load
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.sampling.settings import SamplingSettings
from tests.core.runs import paint
from tests.video.conftest import FAST

SETTINGS = SamplingSettings("", 3.0, 2, height=32, width=32, frames=4)


def recipe(name: str, model: Path, out: Path, *settings: str) -> Any:
    fast = FAST if "clips" in load(name, (), "video", VideoRecipe).sources else FAST[:3] + FAST[4:]
    return load(name, [f"backbone={model}", f"output={out}", *fast, *settings], "video", VideoRecipe)


def learn(name: str, model: Path, out: Path, *settings: str) -> VideoRunner:
    resolved = recipe(name, model, out, *settings)
    runner = open_runner(VideoRunner, resolved.backbone, [], "cpu", **resolved.opening())
    personalize(plan(resolved), runner)
    return runner


def clips(runner: VideoRunner, prompt: str = "a mug on the beach", **how: Any) -> Tensor:
    return runner.generate([prompt], [0], SETTINGS, must_name=False, **how)


@pytest.mark.parametrize("name", ["motion_director", "animatediff_motion_lora"])
def test_a_motion_is_learned_saved_and_reproduced(
    name: str, clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "slide.concept"
    rates = ["trainable.temporal.lr=0.05"]
    runner = learn(name, clip_model, out, f"subject.clips={clip_folder}", *rates)
    made = clips(runner)
    assert made.shape == (1, 3, 4, 32, 32)
    fresh = VideoRunner(load_backbone(clip_model))
    before = clips(fresh)
    assert not torch.allclose(made, before, atol=1e-3)
    fresh.load(read(out))
    assert torch.equal(clips(fresh), made)  # the saved concept reproduces the clip
    fresh.unload("slide")
    assert torch.equal(clips(fresh), before)
    meta = read(out).meta
    assert meta.kind == "motion" and meta.backbone.family == "animatediff"
    touched = [layer for layers in meta.layers.values() for layer in layers]
    # the concept changes only motion modules, so it does not contain the clips' appearance
    assert touched and all("motion_modules" in layer for layer in touched)
    assert sorted(r.file for r in meta.references) == ["a.mp4", "b"] and all(r.sha256 for r in meta.references)


def test_a_motion_and_a_subject_learned_from_pictures_work_together(
    clip_model: Path, picture_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """A concept folder written by `pcs image` works unchanged in a clip, together with a motion."""
    photos = paint(tmp_path / "photos")
    settings = ["train.steps=2", "train.batch_size=2", "train.resolution=32", "sampling.steps=2", "preview.num=0"]
    settings += ["trainable.lora.lr=0.05", "sources.class_pictures=null", "regularize.prior=null"]
    settings += [f"backbone={picture_model}", f"subject.images={photos}", "subject.class_noun=mug"]
    on_pictures = load("dreambooth_lora", [*settings, f"output={tmp_path / 'thing.concept'}"])
    personalize(plan(on_pictures), open_runner(ImageRunner, str(picture_model), [], "cpu"))
    learn(
        "motion_director", clip_model, tmp_path / "slide.concept", f"subject.clips={clip_folder}",
        "trainable.temporal.lr=0.05",
    )  # fmt: skip
    runner = open_runner(
        VideoRunner, str(clip_model), [str(tmp_path / "thing.concept"), str(tmp_path / "slide.concept")], "cpu"
    )
    both = clips(runner, "a photo of a <thing> on the beach")
    runner.unload("slide")
    still_thing = clips(runner, "a photo of a <thing> on the beach")
    assert not torch.allclose(both, still_thing, atol=1e-3)
    with pytest.raises(ValueError, match="'slide' is a motion, and pictures cannot show one"):
        open_runner(ImageRunner, str(picture_model), [str(tmp_path / "slide.concept")], "cpu")


def test_an_image_model_needs_a_motion_module(
    picture_model: Path, clip_model: Path, adapter_folder: Path, clip_folder: Path, tmp_path: Path
) -> None:
    whole = VideoRunner(load_backbone(clip_model))
    made = open_runner(VideoRunner, str(picture_model), [], "cpu", motion_adapter=adapter_folder)
    assert torch.equal(clips(made), clips(whole))
    with pytest.raises(ValueError, match="generates pictures; give motion_adapter=FOLDER"):
        open_runner(VideoRunner, str(picture_model), [], "cpu")
    with pytest.raises(ValueError, match="already generates clips; leave motion_adapter out"):
        open_runner(VideoRunner, str(clip_model), [], "cpu", motion_adapter=adapter_folder)
    with pytest.raises(ValueError, match=r"not a diffusers MotionAdapter, because it has no config.json"):
        open_runner(VideoRunner, str(picture_model), [], "cpu", motion_adapter=tmp_path)


def test_clips_are_written_with_their_settings(clip_model: Path, tmp_path: Path) -> None:
    runner = VideoRunner(load_backbone(clip_model))
    paths = generate(runner, ["a mug"], ClipFiles(tmp_path / "one.mp4", 6, with_sheet=True), SETTINGS, seeds=[7])
    assert [p.name for p in paths] == ["one.mp4", "one-sheet.png"]
    shown = read_clip(paths[0], ClipWindow(length=4))
    assert shown.frames.shape == (3, 4, 256, 256) and shown.fps == 6  # small clips are enlarged for players
    about = json.loads(read_clip_metadata(paths[0])["pcs"])
    assert (about["prompt"], about["seed"], about["frames"], about["steps"]) == ("a mug", 7, 4, 2)
    many = generate(runner, ["a mug", "a dog"], ClipFiles(tmp_path / "all", 6, "gif"), SETTINGS, seeds=[1, 2])
    assert [p.name for p in many] == ["000-seed1.gif", "001-seed2.gif", "002-seed1.gif", "003-seed2.gif"]
    assert all(p.is_file() for p in many)


def test_invalid_outputs_are_reported_before_anything_is_generated(tmp_path: Path) -> None:
    (tmp_path / "there.mp4").write_text("mine")
    for files, count, message in (
        (ClipFiles(tmp_path / "x.avi"), 1, "use a file ending in .mp4, .gif or .webp"),
        (ClipFiles(tmp_path / "x.mp4"), 2, "is one file, but there will be 2 clips"),
        (ClipFiles(tmp_path / "there.mp4"), 1, "already exists"),
        (ClipFiles(tmp_path / "x", kind="avi"), 1, "unknown format 'avi'"),
    ):
        with pytest.raises(ValueError, match=message):
            files.check(count)


def test_a_clip_that_is_too_short_is_reported_before_a_model_is_loaded(
    clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    asked = recipe(
        "motion_director", clip_model, tmp_path / "m.concept", f"subject.clips={clip_folder}",
        "sources.clips.window.length=9",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"sources\.clips: .*a\.mp4 has 6 frames, but length=9"):
        plan(asked)
    for given in ((), (f"subject.clips={clip_folder}", f"subject.images={clip_folder}")):
        with pytest.raises(ValueError, match=r"give either clips \(of a motion\) or images|no pictures"):
            plan(recipe("motion_director", clip_model, tmp_path / "m.concept", *given))
