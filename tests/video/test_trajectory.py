"""Trajectories: measured on clips with and without masks, followed by latents, kept in the concept."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcs_video.commands.video import app
from pcs_video.motion.clip_source import Clips
from pcs_video.motion.follow_trajectory import Following, FollowTrajectory, into_view, place_of
from pcs_video.motion.trajectory import measure
from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.backbones import load_backbone
from shared.cli import run
from shared.concept import export, read
from shared.concept.show import described
from shared.io.clips.window import ClipWindow
from shared.io.clips.write_clip import write_clip
from shared.io.trajectory_settings import Trajectory
from shared.metrics.clips.report import ClipReport
from shared.recipe.resolve import load
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.runner.png_metadata import metadata
from shared.sampling import DenoisingStep, SamplingHookBase, StrengthSchedule
from shared.sampling.settings import SamplingSettings
from shared.toybox.motions.reference_clips import write_frames
from shared.types import Subject
from tests.video.conftest import FAST
from tests.video.test_evaluate_clips import QUICK

SIDE = 64


def drawn(path: np.ndarray, size: float = 0.25) -> tuple[Tensor, Tensor]:
    """A textured square whose centre and size follow a path [F, 3]: frames [3, F, S, S] in [-1, 1], masks [F, S, S]."""
    draw = torch.Generator().manual_seed(0)
    ground = torch.rand(3, SIDE, SIDE, generator=draw) * 0.2
    pattern = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=draw), (SIDE, SIDE), mode="bilinear")[0]
    y, x = torch.meshgrid((torch.arange(SIDE) + 0.5) / SIDE, (torch.arange(SIDE) + 0.5) / SIDE, indexing="ij")
    frames, masks = [], []
    for right, down, log_size in path:
        u, v = ((x - right) / np.exp(log_size) / size, (y - down) / np.exp(log_size) / size)
        inside = (u.abs() < 0.5) & (v.abs() < 0.5)
        at = torch.stack([2 * u, 2 * v], -1)[None].float()
        look = torch.nn.functional.grid_sample(pattern[None], at, padding_mode="border", align_corners=False)[0]
        frames.append(torch.where(inside, 0.3 + 0.7 * look, ground))
        masks.append(inside.float())
    return (torch.stack(frames, 1).clamp(0, 1) * 2 - 1), torch.stack(masks)


def source(length: int = 8) -> Clips:
    return Clips(window=ClipWindow(length=length))


def arc(frames: int = 8, growth: float = 0.0) -> np.ndarray:
    t = np.linspace(0, 1, frames)
    return np.stack([0.3 + 0.4 * t, 0.6 - 0.25 * np.sin(np.pi * t), growth * t], 1)


def subject_of(folder: Path, path: np.ndarray, masked: bool) -> Subject:
    frames, masks = drawn(path)
    write_frames(frames.transpose(0, 1), folder / "a", {})
    if masked:
        write_frames(masks[:, None].expand(-1, 3, -1, -1) * 2 - 1, folder / "masks", {})
    return Subject((), "", {}, {folder / "a": folder / "masks"} if masked else {}, (folder / "a",))


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_masks_give_the_path_of_centre_and_size(tmp_path: Path, growth: float) -> None:
    truth = arc(growth=growth)
    found = np.array(measure(subject_of(tmp_path, truth, True), source(), SIDE))
    assert found == pytest.approx(truth - truth.mean(0), abs=0.02)


def test_without_masks_it_is_the_path_of_the_points_that_move(tmp_path: Path) -> None:
    truth = arc(12)
    found = np.array(measure(subject_of(tmp_path, truth, False), source(12), SIDE))
    assert found[:, :2] == pytest.approx((truth - truth.mean(0))[:, :2], abs=0.04)
    assert np.abs(found[:, 2]).max() < 0.1


def test_clips_are_averaged_around_their_own_means(tmp_path: Path) -> None:
    """The same motion from two places: its trajectory is that of either."""
    paths = [arc(), arc() + np.array([0.1, -0.1, 0])]
    both = [subject_of(tmp_path / str(i), path, True) for i, path in enumerate(paths)]
    masks = {**both[0].masks, **both[1].masks}
    together = measure(Subject((), "", {}, masks, (*both[0].clips, *both[1].clips)), source(), SIDE)
    assert np.array(together) == pytest.approx(np.array(measure(both[0], source(), SIDE)), abs=0.01)


@pytest.mark.parametrize("masked", [True, False])
def test_what_does_not_move_has_none(tmp_path: Path, masked: bool) -> None:
    still = np.tile([0.5, 0.5, 0.0], (8, 1))
    with pytest.raises(
        ValueError, match=r"sampling.trajectory: nothing moves across the frame in .*a: leave this clip out"
    ):
        measure(subject_of(tmp_path, still, masked), source(), SIDE)


class Mixing:
    """A backbone whose latents contain a tenth of the noise for each unit of time."""

    frame_factor = 1

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x0 * (1 - t / 10) + noise * t / 10


def step_of(x: Tensor, index: int, steps: int = 10, seeds: tuple[int, ...] = (1, 2)) -> DenoisingStep:
    backbone: Any = Mixing()
    return DenoisingStep(
        index, steps, torch.tensor(float(steps - index)), backbone, ["a"] * len(x), seeds, torch.ones_like(x)
    )


def moved(hook: FollowTrajectory, x: Tensor, index: int, steps: int = 10, seeds: tuple[int, ...] = (1, 2)) -> Tensor:
    return Following(trajectory=hook.trajectory).latents(step_of(x, index, steps, seeds), x)


def hook_of(points: np.ndarray, start: float = 0.3) -> FollowTrajectory:
    return FollowTrajectory(name="m", trajectory=Trajectory(start=start, points=tuple(map(tuple, points.tolist()))))


def test_each_frame_goes_where_the_trajectory_is() -> None:
    """With each cell's own number in it, every cell that was not filled in shows where it came from."""
    side, points = 16, np.array([[-0.25, 0.0, 0.0], [0.0, 0.125, 0.0], [0.25, -0.25, 0.0]])
    place = torch.arange(side * side, dtype=torch.float32).view(1, 1, 1, side, side)
    made = moved(hook_of(points), place.repeat(2, 1, 3, 1, 1), 3)
    for frame, (right, down, _) in enumerate(points):
        dx, dy = round(right * side), round(down * side)
        for y in range(side):
            for x in range(side):
                there = 0 <= y - dy < side and 0 <= x - dx < side
                row, column = divmod(int(made[0, 0, frame, y, x]), side)
                assert (row, column) == (y - dy, x - dx) if there else (row == y and (column < 3 or column >= 13))


def test_a_size_enlarges_around_the_middle() -> None:
    x = torch.zeros(1, 1, 2, 16, 16)
    x[..., 6:10, 6:10] = 1
    made = moved(hook_of(np.array([[0, 0, 0], [0, 0, np.log(2)]])), x, 3, seeds=(1,))
    assert made[0, 0, 0].sum() == 16 and made[0, 0, 1].sum() == 64 and bool((made[0, 0, 1, 4:12, 4:12] == 1).all())


def test_it_acts_once_and_never_where_it_rests_and_a_clip_does_not_depend_on_its_batch() -> None:
    x = torch.randn(2, 4, 5, 16, 16, generator=torch.Generator().manual_seed(0))
    hook = hook_of(arc(5))
    acts = [i for i in range(10) if not torch.equal(moved(hook, x, i), x)]
    assert acts == [3]
    assert [i for i in range(2) if not torch.equal(moved(hook_of(arc(5), 1.0), x, i, 2), x)] == [1]
    assert not hook.resting().trajectory.points
    both = moved(hook, x, 3)
    assert torch.equal(moved(hook, x[1:], 3, seeds=(2,)), both[1:])
    assert not torch.equal(moved(hook, x, 3, seeds=(1, 3))[1], both[1])


def test_other_numbers_of_frames_show_the_whole_trajectory() -> None:
    points = np.array([[-0.25, 0.0, 0.0], [0.25, 0.0, 0.0]])
    x = torch.zeros(1, 1, 5, 16, 16)
    x[..., 8] = 1
    made = moved(hook_of(points), x, 3, seeds=(1,))
    assert [int(made[0, 0, f, 0].argmax()) for f in range(5)] == [4, 6, 8, 10, 12]


def test_a_subject_near_an_edge_is_kept_in_view() -> None:
    """A bright square at the left would be moved out to the left; it starts farther right instead, by the smallest shift."""
    side, points = 20, np.array([[-0.2, 0, 0], [0.2, 0, 0]])
    clean = torch.zeros(1, 2, 2, side, side)
    clean[..., 8:12, 4:8] = 1  # its centre is at 0.3 of the width
    noise = torch.ones_like(clean)
    following = Following(trajectory=hook_of(points).trajectory)
    assert place_of(clean[0]) == pytest.approx([0.3, 0.5], abs=0.02)
    for index in (2, 3):
        t = (10 - index) / 10
        out = following.latents(step_of(clean, index, seeds=(1,)), clean * (1 - t) + noise * t)
    places = [(out[0, 0, f, 9] > 0.99).nonzero().flatten().double().mean().item() / side for f in (0, 1)]
    assert places == pytest.approx([0.2 - 0.5 / side, 0.6 - 0.5 / side], abs=0.051)


def test_the_shift_into_view_is_the_smallest() -> None:
    path = np.array([[-0.2, -0.4], [0.2, 0.4]])
    assert into_view(np.array([0.5, 0.5]), path, 0.2) == pytest.approx([0, 0])
    assert into_view(np.array([0.3, 0.9]), path, 0.2) == pytest.approx([0.1, -0.4])  # too long downwards: centred
    assert into_view(np.array([0.7, 0.5]), path, 0.2) == pytest.approx([-0.1, 0])


def test_strength_scales_it_within_bounds() -> None:
    path = Trajectory(points=((0.5, -0.25, 0.1), (1.5, 0.0, 0.0)))
    assert path.scaled(0.5).points == ((0.25, -0.125, 0.05), (0.75, 0.0, 0.0))
    assert path.scaled(3).points[1][0] == 2.0


@pytest.fixture
def learned(clip_model: Path, clip_folder: Path, tmp_path: Path) -> Path:
    places = [f"backbone={clip_model}", f"subject.clips={clip_folder}", f"output={tmp_path / 'slide.concept'}"]
    settings = [*places, *FAST, "train.steps=0"]
    recipe: Any = load("motion_trajectory", settings, "video", VideoRecipe)
    runner = open_runner(VideoRunner, recipe.backbone, [], "cpu", **recipe.opening())
    return personalize(plan(recipe), runner)["slide"]


def test_a_concept_keeps_it_and_only_clips_that_name_it_follow(learned: Path, clip_model: Path) -> None:
    concept = read(learned)
    points = np.array(concept.meta.recipe["sampling"]["trajectory"]["points"])
    assert len(points) == 4 and bool((np.diff(points[:, 0]) > 0.03).all())  # the square slides to the right
    about = dict(described(concept))
    assert about["trajectory"].startswith("4 points over ") and about["trajectory"].endswith("from 20% of the steps on")
    assert about["use"].startswith('pcs video generate "a photo of a mug <slide> on the beach" --concept slide.concept')
    assert not {*concept.meta.adapters, *concept.meta.weights, *concept.meta.branches} and about["parameters"] == "0"
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(concept)
    how = SamplingSettings("", 1.0, 4, height=64, width=64, frames=4)
    prompts = ["a mug <slide>", "a mug", "a mug <slide>"]
    made = runner.generate(prompts, [0, 0, 1], how, must_name=False)
    torch.testing.assert_close(made[:1], runner.generate(prompts[:1], [0], how), atol=1e-4, rtol=0)
    torch.testing.assert_close(made[2:], runner.generate(prompts[2:], [1], how), atol=1e-4, rtol=0)
    assert (made[0] - made[1]).abs().max() > 0.01  # the words are the same: a motion has none
    given = replace(how, hooks=(hook_of(points).model_copy(update={"name": "another"}),))
    with pytest.raises(ValueError, match=r"names <another> and <slide>, but a clip can follow only one trajectory"):
        runner.generate(["a mug <slide>"], [0], given)
    own = runner.with_own_sampling(how)  # as `pcs video generate` passes it
    torch.testing.assert_close(runner.generate(["a mug <slide>"], [0], own, base=True), made[1:2], atol=1e-4, rtol=0)
    runner.unload("slide")
    plain = runner.generate(["a mug"], [0], how)
    torch.testing.assert_close(plain, made[1:2], atol=1e-4, rtol=0)
    assert (runner.generate(["a mug"], [0], given) - plain).abs().max() > 0.01  # a hook of the caller's needs no name
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


def test_progress_counts_all_clips_and_what_is_given_comes_last(learned: Path, clip_model: Path) -> None:
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
    assert (following - resting).abs().max() > 0.1  # moved before the other hook looks


def test_files_tell_the_strength_and_exports_and_strengths_by_step_are_refused(learned: Path, clip_model: Path) -> None:
    concept, runner = read(learned), VideoRunner(load_backbone(clip_model))
    runner.load(concept, 0.5)
    how = runner.with_own_sampling(SamplingSettings("", 1.0, 2, frames=4))
    told = json.loads(metadata("a <slide>", 0, runner, how)["pcs"])
    assert told["concepts"] == {"slide": 0.5} and told["hooks"][0]["kind"] == "follow_trajectory"
    with pytest.raises(ValueError, match="'slide' makes clips follow a trajectory, which diffusers files cannot store"):
        export(concept, learned.parent / "out", backbone=runner.backbone)
    assert not (learned.parent / "out").exists()
    stepwise = replace(how, hooks=(StrengthSchedule.parse("slide=0@0,1@0.5"),))
    with pytest.raises(ValueError, match="'slide' is a trajectory, which has one strength for the whole clip"):
        runner.generate(["a <slide>"], [0], stepwise)


def test_another_recipe_takes_a_trajectory_too(clip_model: Path, clip_folder: Path, tmp_path: Path) -> None:
    """A LoRA and a path: both act where the prompt names the motion, only the LoRA elsewhere."""
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


def test_a_trajectory_of_two_motions_is_refused_before_a_model_is_loaded(
    clip_folder: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = [f"subjects.{name}.clips={clip_folder / clip}" for name, clip in (("one", "a.mp4"), ("other", "b"))]
    asked = ["personalize", "motion_trajectory", *two, f"output={tmp_path / 'out'}", *FAST, "train.steps=0"]
    broken = shutil.copytree(clip_model, tmp_path / "broken")
    for file in broken.rglob("*.safetensors"):
        file.write_bytes(b"")  # loading it would be another error
    assert run(app, [*asked, f"backbone={broken}"]) == 2
    assert "sampling.trajectory: measured on the clips of exactly one motion" in capsys.readouterr().err


def test_a_subject_has_no_trajectory(clip_model: Path, tmp_path: Path) -> None:
    write_clip(tmp_path / "clips" / "a.mp4", drawn(arc())[0], 8)
    settings = [
        f"backbone={clip_model}",
        f"subject.clips={tmp_path / 'clips'}",
        f"output={tmp_path / 'm.concept'}",
        *FAST,
    ]
    recipe: Any = load("motion_trajectory", settings, "video", VideoRecipe)
    runner = open_runner(VideoRunner, recipe.backbone, [], "cpu")
    with pytest.raises(ValueError, match=r"sampling.trajectory: measured on the clips of exactly one motion"):
        runner.measured({"mug": Subject((), "mug")}, recipe)
    given = load(
        "motion_trajectory", [*settings, "sampling.trajectory.points=[[0,0,0],[0.1,0,0]]"], "video", VideoRecipe
    )
    assert runner.measured({}, given) is given


@pytest.mark.parametrize("how", ["unnamed", "off"])
def test_without_its_name_or_switched_off_a_motion_is_not_followed(
    learned: Path, clip_folder: Path, tmp_path: Path, how: str
) -> None:
    prompts = tmp_path / "mine.yaml"
    prompts.write_text('prompts:\n- {text: "a {thing} {concept} on the beach", thing: red mug}\n')
    asked = ["evaluate", "--concept", learned, "--prompts", prompts, "--references", clip_folder, "--false-motion", how]
    assert run(app, [str(a) for a in [*asked, "--out", tmp_path / "report", *QUICK]]) == 0
    scores = {s.key: s.value for s in ClipReport.load(tmp_path / "report").scores}
    assert scores["false_motion"] != pytest.approx(scores["motion_fidelity"], abs=1e-6)
