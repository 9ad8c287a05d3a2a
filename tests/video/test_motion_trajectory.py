"""Trajectories are learned as motions, saved in concepts, and followed by clips whose prompts name them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pcs_3d.runner import Runner3D
from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.backbones.wan import WanBackbone
from pcs_video.commands.video import app
from pcs_video.motion.camera_pan import CameraPan
from pcs_video.motion.follow_trajectory import (
    FollowTrajectory,
)
from pcs_video.recipe import ClipSampling, VideoRecipe
from pcs_video.runner import VideoRunner
from shared.backbones import Backbone, load_backbone
from shared.cli import build, run
from shared.concept import export, read
from shared.concept.show import described
from shared.io.clips.write_clip import write_clip
from shared.metrics.clips.report import ClipReport
from shared.recipe.resolve import load
from shared.runner.base import Runner
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.runner.png_metadata import metadata
from shared.sampling import DenoisingStep, SamplingHookBase, StrengthSchedule
from shared.sampling.sampler import denoise
from shared.sampling.settings import SamplingSettings
from shared.types import Subject
from tests.video.conftest import FAST
from tests.video.test_evaluate_clips import QUICK
from tests.video.trajectories import arc, drawn, hook_of, path_of
from tests.video.transformer_models import build_wan


@pytest.fixture
def learned(clip_model: Path, clip_folder: Path, tmp_path: Path) -> Path:
    places = [f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={tmp_path / 'slide.concept'}"]
    settings = [*places, *FAST, "train.steps=0"]
    recipe: Any = load("motion_trajectory", settings, "video", VideoRecipe)
    runner = open_runner(VideoRunner, recipe.backbone, [], "cpu", **recipe.opening())
    return personalize(plan(recipe), runner)["slide"]


def test_a_concept_stores_a_trajectory_and_only_clips_that_name_it_follow_it(learned: Path, clip_model: Path) -> None:
    concept = read(learned)
    points = np.array(concept.meta.recipe["sampling"]["trajectory"]["points"])
    # like the square, the points move to the right
    assert len(points) == 4 and bool((np.diff(points[:, 0]) > 0.03).all())
    about = dict(described(concept))
    assert about["trajectory"].startswith("4 points over ")
    assert about["trajectory"].endswith("followed from 60% of the steps on, without a motion module")
    assert about["use"].startswith('pcs video generate "a photo of a mug <slide> on the beach" --concept slide.concept')
    assert not {*concept.meta.adapters, *concept.meta.weights, *concept.meta.branches} and about["parameters"] == "0"
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(concept)
    how = SamplingSettings("", 1.0, 4, height=64, width=64, frames=4)
    prompts = ["a mug <slide>", "a mug", "a mug <slide>"]
    made = runner.generate(prompts, [0, 0, 1], how, must_name=False)
    torch.testing.assert_close(made[:1], runner.generate(prompts[:1], [0], how), atol=1e-4, rtol=0)
    torch.testing.assert_close(made[2:], runner.generate(prompts[2:], [1], how), atol=1e-4, rtol=0)
    # a motion without words leaves the encoded text unchanged, so the difference comes from the trajectory
    assert (made[0] - made[1]).abs().max() > 0.01
    given = replace(how, hooks=(hook_of(points).model_copy(update={"name": "another"}),))
    with pytest.raises(ValueError, match=r"names <another> and <slide>, but a clip can follow only one trajectory"):
        runner.generate(["a mug <slide>"], [0], given)
    own = runner.with_own_sampling(how)  # the settings as `pcs video generate` passes them
    torch.testing.assert_close(runner.generate(["a mug <slide>"], [0], own, base=True), made[1:2], atol=1e-4, rtol=0)
    runner.unload("slide")
    plain = runner.generate(["a mug"], [0], how)
    torch.testing.assert_close(plain, made[1:2], atol=1e-4, rtol=0)
    # a hook from the caller takes effect even if the prompt does not name it
    assert (runner.generate(["a mug"], [0], given) - plain).abs().max() > 0.01
    runner.load(concept, 0.0)
    torch.testing.assert_close(runner.generate(prompts[:1], [0], how), plain, atol=1e-4, rtol=0)
    runner.unload("slide")
    runner.load(concept, 0.5)
    half = runner.with_own_sampling(how).hooks[-1]
    assert isinstance(half, FollowTrajectory) and np.array(half.trajectory.points) == pytest.approx(points / 2)


@pytest.mark.parametrize("points", [[[0, 0]], [[0, 0, 9]], [["a", 0, 0]], [[0, 0, 0]] * 10_001])
def test_a_concept_with_a_damaged_trajectory_is_refused(learned: Path, points: Any) -> None:
    file = learned / "concept.json"
    meta = json.loads(file.read_text())
    meta["recipe"]["sampling"]["trajectory"]["points"] = points
    file.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"sampling\.trajectory\.points"):
        read(learned)


def test_progress_covers_all_clips_and_hooks_from_the_caller_run_last(learned: Path, clip_model: Path) -> None:
    runner, seen, order = VideoRunner(load_backbone(clip_model)), [], []
    runner.load(read(learned))

    class Told(SamplingHookBase):
        def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
            order.append((step.index, latents.clone()))
            return latents

    how = SamplingSettings("", 1.0, 4, height=64, width=64, frames=4, hooks=(Told(),))
    runner.generate(
        ["a <slide>", "a", "a <slide>"], [0, 0, 1], how, must_name=False, progress=lambda *x: seen.append(x)
    )
    assert {of for _, of in seen} == {12} and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (12, 12)
    following, resting = ([x[:1] for index, x in order if index == 1][k] for k in (0, 1))
    assert (following - resting).abs().max() > 0.1  # the subject has moved before the other hook runs


def test_a_trajectory_has_one_recorded_strength_and_cannot_be_exported(learned: Path, clip_model: Path) -> None:
    concept, runner = read(learned), VideoRunner(load_backbone(clip_model))
    runner.load(concept, 0.5)
    how = runner.with_own_sampling(SamplingSettings("", 1.0, 2, frames=4))
    told = json.loads(metadata("a <slide>", 0, runner, how)["pcs"])
    assert told["concepts"] == {"slide": 0.5} and told["hooks"][0]["kind"] == "follow_trajectory"
    with pytest.raises(ValueError, match="'slide' makes clips follow a trajectory, which diffusers files cannot store"):
        export(concept, learned.parent / "out", backbone=runner.backbone)
    assert not (learned.parent / "out").exists()
    stepwise = replace(how, hooks=(StrengthSchedule.parse("slide=0@0,1@0.5"),))
    with pytest.raises(ValueError, match="'slide' is a trajectory, which has one strength for all steps"):
        runner.generate(["a <slide>"], [0], stepwise)


def test_other_recipes_can_also_use_a_trajectory(clip_model: Path, clip_folder: Path, tmp_path: Path) -> None:
    """If the prompt names a motion with a LoRA and a trajectory, both take effect. Otherwise, only the LoRA does."""
    places = [f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={tmp_path / 'both.concept'}"]
    asked = [
        "personalize",
        "motion_director",
        *places,
        *FAST,
        "sampling.trajectory.start=0.3",
        "trainable.temporal.lr=0.05",
    ]
    assert run(app, asked) == 0
    concept, runner = read(tmp_path / "both.concept"), VideoRunner(load_backbone(clip_model))
    assert concept.meta.learned_with.sampling.trajectory.start == 0.3 and set(concept.meta.adapters) == {"temporal"}
    how = SamplingSettings("", 1.0, 4, height=32, width=32, frames=4)
    plain = runner.generate(["a"], [0], how)
    runner.load(concept)
    lora, both = (runner.generate([text], [0], how, must_name=False) for text in ("a", "a <both>"))
    assert (lora - plain).abs().max() > 1e-3 and (both - lora).abs().max() > 0.01


def test_motion_layers_cannot_be_skipped_if_a_motion_was_learned_in_them(
    learned: Path, clip_folder: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe that skips motion layers is refused if it also trains them.

    A prompt is refused if it names both a trajectory that skips motion layers and a motion that was learned in them.
    """
    asked = ["personalize", "motion_director", f"backbone={clip_model}", f"subject.clips={clip_folder}", *FAST]
    path = [f"output={tmp_path / 'lora.concept'}", "sampling.trajectory.layers=image"]
    assert run(app, [*asked, *path]) == 2
    assert "'image' skips the motion layers, which trainable.temporal trains" in capsys.readouterr().err
    assert run(app, [*asked, path[0]]) == 0
    runner = VideoRunner(load_backbone(clip_model))
    for concept in (read(learned), read(tmp_path / "lora.concept")):
        runner.load(concept)
    how = SamplingSettings("", 1.0, 2, height=32, width=32, frames=4)
    with pytest.raises(ValueError, match=r"names <lora>, but <slide> skips the motion"):
        runner.generate(["a <slide> <lora>"], [0], how)
    assert runner.generate(["a <slide>", "a <lora>"], [0, 1], how, must_name=False).shape[0] == 2


def test_a_motion_with_its_own_words_can_follow_a_trajectory(
    clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    """Words affect the image layers, so no learned part is skipped. A camera pan can be added to the trajectory."""
    asked = ["personalize", "motion_trajectory", f"backbone={clip_model}", f"subject.clips={clip_folder}", *FAST]
    words = ["modifier={kind: learnable_token, init: moving}", "trainable.words={kind: tokens}", "train.steps=1"]
    assert run(app, [*asked, *words, f"output={tmp_path / 'said.concept'}"]) == 0
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(read(tmp_path / "said.concept"))
    how = SamplingSettings("", 1.0, 4, height=64, width=64, frames=4)
    plain = runner.generate(["a <said>"], [0], how)
    panned = runner.generate(["a <said>"], [0], replace(how, hooks=(CameraPan(right=0.5, start=0.2, end=0.6),)))
    assert panned.isfinite().all() and (panned - plain).abs().max() > 0.01


def test_a_model_without_separate_image_layers_uses_all_layers_and_reports_it(
    clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    path = ClipSampling(trajectory=path_of(arc(5), layers="image"))
    wan = WanBackbone(build_wan(), "tiny")
    assert path.port(wan) == "sampling.trajectory.layers: wan has no separate motion layers, so all its layers are used"
    places = [f"subject.clips={clip_folder}", f"output={tmp_path / 'slide.concept'}", *FAST, "train.steps=0"]
    settings = ["backbone=wan", "sources.clips.window.length=5", "preview.num=0"]
    recipe: Any = load("motion_trajectory", [*places, *settings], "video", VideoRecipe)
    learned = VideoRunner(wan).personalize({"slide": recipe.subject.read()}, recipe, tmp_path / "training")
    assert learned["slide"].meta.ports == (path.port(wan),)
    assert path.port(load_backbone(clip_model)) == ClipSampling().port(wan) == ""
    shape = wan.latent_shape(32, 32, 9)
    noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
    assert path.trajectory is not None
    hook = FollowTrajectory(name="m", trajectory=path.trajectory)
    how = SamplingSettings("", 1.0, 4, height=32, width=32, frames=9, hooks=(hook,))
    assert torch.equal(hook.ready(wan, how).initial_noise(wan, noise), noise)
    made, plain = (
        list(denoise(wan, ["a cup"], seeds=[0], settings=s))[-1].latents for s in (how, replace(how, hooks=()))
    )
    assert made.isfinite().all() and not torch.allclose(made, plain)


def test_a_trajectory_of_two_motions_is_refused_before_a_model_is_loaded(
    clip_folder: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = [f"subjects.{name}.clips={clip_folder / clip}" for name, clip in (("one", "a.mp4"), ("other", "b"))]
    asked = ["personalize", "motion_trajectory", *two, f"output={tmp_path / 'out'}", *FAST, "train.steps=0"]
    broken = shutil.copytree(clip_model, tmp_path / "broken")
    for file in broken.rglob("*.safetensors"):
        file.write_bytes(b"")  # loading the model would raise another error
    assert run(app, [*asked, f"backbone={broken}"]) == 2
    assert "sampling.trajectory is measured on the clips of exactly one motion" in capsys.readouterr().err


def test_a_trajectory_cannot_be_measured_for_a_subject(clip_model: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clips" / "a.mp4", drawn(arc())[0], 8)
    settings = [
        f"backbone={clip_model}",
        f"subject.clips={tmp_path / 'clips'}",
        f"output={tmp_path / 'm.concept'}",
        *FAST,
    ]
    recipe: Any = load("motion_trajectory", settings, "video", VideoRecipe)
    runner = open_runner(VideoRunner, recipe.backbone, [], "cpu")
    with pytest.raises(ValueError, match=r"sampling.trajectory is measured on the clips of exactly one motion"):
        runner.measured({"mug": Subject((), "mug")}, recipe)
    given = load(
        "motion_trajectory", [*settings, "sampling.trajectory.points=[[0,0,0],[0.1,0,0]]"], "video", VideoRecipe
    )
    assert runner.measured({}, given) is given


@pytest.mark.parametrize("how", ["unnamed", "off"])
def test_a_motion_is_not_followed_if_it_is_unnamed_or_off(
    learned: Path, clip_folder: Path, tmp_path: Path, how: str
) -> None:
    prompts = tmp_path / "mine.yaml"
    prompts.write_text('prompts:\n- {text: "a {thing} {concept} on the beach", thing: red mug}\n')
    asked = ["evaluate", "--concept", learned, "--prompts", prompts, "--references", clip_folder, "--false-motion", how]
    assert run(app, [str(a) for a in [*asked, "--out", tmp_path / "report", *QUICK]]) == 0
    scores = {s.key: s.value for s in ClipReport.load(tmp_path / "report").scores}
    assert scores["false_motion"] != pytest.approx(scores["motion_fidelity"], abs=1e-6)


def test_clips_without_the_motion_are_generated_once_for_several_motions(
    learned: Path, clip_model: Path, clip_folder: Path, tmp_path: Path
) -> None:
    prompts, made = tmp_path / "mine.yaml", []
    prompts.write_text('prompts:\n- {text: "a {thing} {concept} on the beach", thing: red mug}\n')

    class Counting(VideoRunner):
        def generate(self, prompts: Sequence[str], seeds: Sequence[int], *rest: Any, **more: Any) -> Tensor:
            made.append((bool(more.get("base")), *prompts))
            return super().generate(prompts, seeds, *rest, **more)

    runner, kept = Counting(load_backbone(clip_model)), {}
    small = SamplingSettings("", 2.0, 2, height=32, width=32, frames=4)
    settings = ClipEvaluationSettings(str(prompts), (3,), sampling=small, references=clip_folder)
    slide = read(learned)
    hop = replace(slide, meta=slide.meta.model_copy(update={"name": "hop"}))
    files, costs = [], []
    for concept in (slide, hop):
        runner.load(concept)
        report = evaluate_clips_loaded(runner, settings, kept=kept)
        files.append([report.files[report.of_kind(kind)[0].file] for kind in ("base", "unnamed")])
        runner.unload(concept.meta.name)
        costs.append(report.costs.base_seconds_per_clip)
    # the cost is the time taken to generate the clips, not to look them up
    assert files[0] == files[1] and costs[0] == costs[1]
    a, b, plain = "a red mug <slide> on the beach", "a red mug <hop> on the beach", "a red mug on the beach"
    assert sorted(made) == sorted([(False, a), (False, b), (False, plain), (True, plain)])


def test_an_image_model_alone_can_follow_a_trajectory_but_cannot_learn_another_motion(
    make_tiny_sd: Callable[..., Any], clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the prompt does not name the motion, the clip stands still and a warning is given."""
    make_tiny_sd().save_pretrained(tmp_path / "sd")
    model = [f"backbone={tmp_path / 'sd'}", "motion_adapter=none"]
    asked = ["personalize", "motion_trajectory", *model, f"subject.clips={clip_folder}", *FAST, "train.steps=0"]
    assert run(app, [*asked, f"output={tmp_path / 'slide.concept'}", "sampling.steps=4"]) == 0
    made = ["generate", "a <slide>", "a cup", "--concept", tmp_path / "slide.concept", "--motion-adapter", "none"]
    size = ["--out", tmp_path / "clips", "--height", "32", "--width", "32", "--frames", "4", "--steps", "4"]
    with pytest.warns(
        UserWarning,
        match="nothing will move in the clips of 'a cup', because it names no trajectory and there is no motion",
    ):
        assert run(app, [str(a) for a in [*made, *size, "--format", "frames"]]) == 0
    moving, still = (
        torch.stack([torch.from_numpy(np.array(Image.open(f))).int() for f in sorted(folder.glob("*.png"))])
        for folder in sorted(p for p in (tmp_path / "clips").iterdir() if p.is_dir())
    )
    assert (still - still[:1]).abs().max() <= 1 and (moving - moving[:1]).abs().max() > 10
    still_pictures = [
        "image",
        "generate",
        "a <slide>",
        "--concept",
        tmp_path / "slide.concept",
        "--out",
        tmp_path / "pictures",
    ]
    assert run(build(), [str(a) for a in still_pictures]) == 2
    assert "'slide' is a motion, and pictures cannot show one" in " ".join(capsys.readouterr().err.split())
    for runner in (Runner, Runner3D):
        with pytest.raises(ValueError, match="is a motion"):
            runner(load_backbone(tmp_path / "sd")).load(read(tmp_path / "slide.concept"))
    backbone: Any = with_motion_adapter(load_backbone(tmp_path / "sd"), "none")
    x = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words, t = backbone.encode(["a cup", "a dog"]), torch.tensor([500.0, 20.0])
    with torch.no_grad():
        each = torch.stack([backbone.predict(x[:, :, f], t, words) for f in range(3)], 2)
        torch.testing.assert_close(backbone.predict(x, t, words), each, atol=1e-5, rtol=1e-4)
    assert isinstance(backbone, Backbone) and backbone.reads == {"stable_diffusion"}
    asked[1] = "motion_director"
    assert run(app, [*asked, f"output={tmp_path / 'lora.concept'}", "train.steps=1"]) == 2
