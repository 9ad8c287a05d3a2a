"""A motion can make clips start from the noise found by inverting one of its training clips.

Tune-A-Video and Motion Inversion use such noise.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pcs_video.commands.video import app
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.backbones import load_backbone
from shared.cli import run
from shared.concept import read
from shared.recipe.resolve import load
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.runner.png_metadata import metadata
from shared.sampling.inversion import NoisePrior
from shared.sampling.settings import SamplingSettings
from tests.core.test_inversion import there_and_back
from tests.video.conftest import FAST
from tests.video.transformer_runs import FAMILIES, frames_of, noise

HOW = SamplingSettings("", 1.0, 2, height=32, width=32, frames=4)


@pytest.fixture
def learned(clip_model: Path, clip_folder: Path, tmp_path: Path) -> Path:
    """Learns a concept and saves it next to its training clips, as users do."""
    clips = shutil.copytree(clip_folder, tmp_path / "clips")
    places = [f"backbone={clip_model}", f"subject.clips={clips}", f"output={tmp_path / 'slide.concept'}"]
    settings = [*places, *FAST, "train.steps=0", "sampling.noise_prior={share: 0.8, refine: 1}", "sampling.frames=4"]
    recipe: Any = load("animatediff_motion_lora", settings, "video", VideoRecipe)
    runner = open_runner(VideoRunner, recipe.backbone, [], "cpu", **recipe.opening())
    return personalize(plan(recipe), runner)["slide"]


def test_only_clips_whose_prompts_name_the_motion_start_from_the_noise_of_a_training_clip(
    learned: Path, clip_model: Path
) -> None:
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(read(learned))
    prompts = ["a mug <slide>", "a mug"]
    made = runner.generate(prompts, [0, 0], HOW, must_name=False)
    by_hand = NoisePrior(path=learned.parent / "clips" / "a.mp4", share=0.8, refine=1)
    given = runner.generate(prompts, [0, 0], replace(HOW, hooks=(by_hand,)), must_name=False)
    torch.testing.assert_close(made[:1], given[:1], atol=1e-4, rtol=0)
    # a motion without learned tokens leaves the encoded text unchanged, so the difference comes from the noise
    assert (made[0] - made[1]).abs().max() > 0.01
    assert (given[1] - made[1]).abs().max() > 0.01  # a prior that the caller passes applies to every prompt
    own = runner.with_own_sampling(HOW)  # the settings that `pcs video generate` passes
    torch.testing.assert_close(runner.generate(prompts[:1], [0], own), made[:1], atol=1e-4, rtol=0)
    base = runner.generate(prompts[:1], [0], own, base=True)
    runner.unload("slide")
    torch.testing.assert_close(base, runner.generate(["a mug"], [0], HOW), atol=1e-4, rtol=0)
    runner.load(read(learned), 0.0)
    assert not runner.with_own_sampling(HOW).hooks and not runner.with_own_sampling(replace(HOW, frames=0)).hooks


def test_metadata_names_the_clip_without_its_folders(learned: Path, clip_model: Path) -> None:
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(read(learned))
    (hook,) = json.loads(metadata("a <slide>", 0, runner, runner.with_own_sampling(HOW))["pcs"])["hooks"]
    assert hook["kind"] == "noise_prior" and hook["share"] == 0.8 and hook["path"] == "a.mp4"


def test_missing_clips_cause_a_warning_and_evaluation_uses_the_given_clips(learned: Path, clip_model: Path) -> None:
    (learned.parent / "elsewhere").mkdir()
    moved = learned.parent / "elsewhere"
    shutil.move(learned, moved / "slide.concept")
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(read(moved / "slide.concept"))
    with pytest.warns(
        UserWarning, match="from the noise of the first clip it was learned from, but that clip was not found next"
    ):
        plain = runner.generate(["a mug <slide>"], [0], HOW)
    runner.unload("slide")
    torch.testing.assert_close(plain, runner.generate(["a mug"], [0], HOW), atol=1e-4, rtol=0)
    runner.load(read(moved / "slide.concept"))
    judged = ClipEvaluationSettings(seeds=(0,), limit=1, sampling=HOW, references=learned.parent / "clips")
    report = evaluate_clips_loaded(runner, judged)
    # clips whose prompts do not name the motion differ from the others, so they are generated too
    assert any(row.kind == "unnamed" for row in report.clips)
    (hook,) = runner.with_own_sampling(HOW).hooks
    assert isinstance(hook, NoisePrior) and hook.path.name == "a.mp4"
    with pytest.warns(
        UserWarning, match=r"but a\.mp4 has only 6 of the 8 frames needed. They will start from random noise"
    ):
        assert not runner.with_own_sampling(replace(HOW, frames=8)).hooks


def test_two_priors_in_one_prompt_and_recipes_without_clips_are_refused(
    learned: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(read(learned))
    another = NoisePrior(path=tmp_path / "clips" / "b", name="another")
    with pytest.raises(
        ValueError, match="names <another> and <slide>, but a clip can start from the noise of only one"
    ):
        runner.generate(["a <slide>"], [0], replace(HOW, hooks=(another,)))
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "photos" / "mug.png")
    asked = ["personalize", "subject_lora", f"subject.images={tmp_path / 'photos'}", "subject.class_noun=mug"]
    asked.append("sampling.noise_prior.share=0.5")
    assert run(app, [*asked, f"output={tmp_path / 'mug.concept'}", f"backbone={clip_model}"]) == 2
    assert "sampling.noise_prior takes noise from the motion's own clips" in capsys.readouterr().err


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_from_the_inverted_noise_of_a_clip_returns_the_clip(family: str) -> None:
    """This also holds if Wan 2.2's two experts take turns."""
    backbone: Any = FAMILIES[family]().to(dtype=torch.float64)
    shape = backbone.latent_shape(32, 32, frames_of(backbone))
    clean = 0.7 * noise(2, *shape).double()
    assert there_and_back(backbone, clean, 10, refine=12) < 1e-5
