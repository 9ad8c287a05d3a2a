"""Trajectories: measured on clips with and without masks, followed by latents, kept in the concept."""

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

from pcs_video.backbones.open_motion import with_motion_adapter
from pcs_video.backbones.wan import WanBackbone
from pcs_video.commands.video import app
from pcs_video.motion.camera_pan import CameraPan
from pcs_video.motion.clip_source import Clips
from pcs_video.motion.follow_trajectory import (
    Following,
    FollowTrajectory,
    centre_of,
    into_view,
    subject_mask,
    widened,
)
from pcs_video.motion.trajectory import measure
from pcs_video.recipe import ClipSampling, VideoRecipe
from pcs_video.runner import VideoRunner
from shared.backbones import Backbone, load_backbone
from shared.cli import run
from shared.concept import export, read
from shared.concept.show import described
from shared.io.clips.window import ClipWindow
from shared.io.clips.write_clip import write_clip
from shared.io.trajectory_settings import Trajectory
from shared.metrics.clips.report import ClipReport
from shared.recipe.resolve import load
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.runner.png_metadata import metadata
from shared.sampling import DenoisingStep, SamplingHookBase, StrengthSchedule
from shared.sampling.sampler import denoise
from shared.sampling.settings import SamplingSettings
from shared.toybox.motions.reference_clips import write_frames
from shared.types import Subject
from tests.video.conftest import FAST
from tests.video.test_evaluate_clips import QUICK
from tests.video.transformer_models import build_wan

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

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t / 10, t / 10


def step_of(clean: Tensor | None, index: int, steps: int = 10, seeds: Sequence[int] = (1, 2)) -> DenoisingStep:
    backbone: Any = Mixing()
    noise = torch.zeros(1)
    t = torch.tensor(float(steps - index))
    return DenoisingStep(index, steps, t, backbone, ["a"] * len(seeds), tuple(seeds), noise, clean=clean)


def scene(side: int = 16, frames: int = 2, clips: int = 1) -> tuple[Tensor, Tensor]:
    """Clean latents of a square with numbered cells on rows of one value each, [B, 2, f, S, S], and unit noise."""
    rows = torch.arange(side, dtype=torch.float32)[:, None].expand(side, side)
    clean = torch.stack([rows, -rows])
    number = torch.arange(16, dtype=torch.float32).view(4, 4)
    clean[:, 6:10, 6:10] = torch.stack([100 + number, 200 + number])
    noise = torch.randn(clips, 2, frames, side, side, generator=torch.Generator().manual_seed(0))
    return clean[None, :, None].repeat(clips, 1, frames, 1, 1), noise


def moved(
    trajectory: Trajectory, clean: Tensor, noise: Tensor, index: int = 4, seeds: Sequence[int] = (1,)
) -> tuple[Tensor, float, float]:
    """Returns the latents of a clip after the hook's step `index` of 10, with the shares of signal and noise in them."""
    signal, noisy = index / 10, 1 - index / 10
    step = step_of(clean, index, seeds=seeds)
    return Following(trajectory=trajectory).latents(step, signal * clean + noisy * noise), signal, noisy


def path_of(points: Sequence[Sequence[float]] | np.ndarray, **more: Any) -> Trajectory:
    return Trajectory(points=tuple(map(tuple, np.asarray(points).tolist())), **more)


def hook_of(points: np.ndarray, start: float = 0.3) -> FollowTrajectory:
    return FollowTrajectory(name="m", trajectory=path_of(points, start=start))


def test_the_subject_goes_where_the_trajectory_is_and_its_background_stays() -> None:
    """Cells of the square come with their noise; behind it each row continues, with new noise; the rest is as before."""
    side, points = 16, [[-0.25, 0.0, 0.0], [0.25, -0.125, 0.0]]
    clean, noise = scene(side)
    made, signal, noisy = moved(path_of(points), clean, noise)
    found = subject_mask(clean[0])
    assert found[6:10, 6:10].all() and found.sum() <= 36  # smoothing may add a border of one cell
    hole = widened(found)
    for frame, (right, down, _) in enumerate(points):
        dx, dy = round(right * side), round(down * side)
        there = torch.zeros_like(hole)
        there[6 + dy : 10 + dy, 6 + dx : 10 + dx] = True
        came = signal * clean + noisy * noise
        torch.testing.assert_close(
            made[0, :, frame, 6 + dy : 10 + dy, 6 + dx : 10 + dx], came[0, :, frame, 6:10, 6:10], atol=1e-3, rtol=0
        )
        border = torch.roll(hole, (dy, dx), (0, 1))
        outside = ~hole & ~border
        torch.testing.assert_close(made[0, :, frame][:, outside], came[0, :, frame][:, outside], atol=1e-3, rtol=0)
        behind = hole & ~border
        left = (made[0, :, frame] - signal * clean[0, :, frame, :, :1]) / noisy  # every row's value is that of its edge
        assert behind.sum() > 10 and left[:, behind].abs().max() < 5
        assert (left - noise[0, :, frame])[:, behind].abs().min() > 1e-4


def test_frames_need_not_be_square() -> None:
    """Fractions are of each side: a fifth of the width is more cells than a fifth of the height."""
    clean, noise = torch.zeros(1, 1, 2, 10, 20), torch.ones(1, 1, 2, 10, 20)
    clean[..., 4:6, 9:11] = 100
    made, signal, _ = moved(path_of([[-0.2, 0, 0], [0, 0.2, 0]]), clean, noise)
    bright = [(made[0, 0, f] / signal > 50).nonzero().double().mean(0).tolist() for f in (0, 1)]
    assert bright == [[4.5, 5.5], [6.5, 9.5]]


def test_between_cells_clean_latents_are_interpolated_and_noise_is_not() -> None:
    clean, noise = scene()
    made, signal, noisy = moved(path_of([[1 / 32, 0, 0], [0, 0, 0]]), clean, noise)  # half a cell, and none
    torch.testing.assert_close(made[:, :, 1], (signal * clean + noisy * noise)[:, :, 1], atol=1e-3, rtol=0)
    mean = (clean[0, :, 0, 6:10, 6:9] + clean[0, :, 0, 6:10, 7:10]) / 2  # each from two cells
    left = (made[0, :, 0, 6:10, 7:10] - signal * mean) / noisy
    assert (left - noise[0, :, 0, 6:10, 7:10]).abs().max() < 1e-3  # that of the nearest cell


def test_a_size_enlarges_around_the_subjects_centre_and_noise_stays_noise() -> None:
    side = 48
    clean = torch.zeros(1, 2, 2, side, side)
    clean[..., 20:28, 12:20] = 1  # its centre is at (1/3, 1/2)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    made, signal, noisy = moved(path_of([[0, 0, 0], [0, 0, np.log(2)]]), clean, noise)
    large = torch.zeros(side, side)
    large[16:32, 8:24] = 1
    left = (made[0, :, 1] - signal * large) / noisy
    inner = left[:, 18:30, 10:22]
    assert inner.std() == pytest.approx(1, abs=0.15) and len(inner.round(decimals=4).unique()) > 0.98 * inner.numel()
    outer = torch.ones(side, side, dtype=torch.bool)
    outer[4:44, :36] = False  # the mask has a border, which is enlarged too
    torch.testing.assert_close(left[:, outer], noise[0, :, 1][:, outer], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("start", "order", "at"), [(0.3, 1, 3), (0.0, 1, 0), (1.0, 1, 9), (0.3, 2, 4), (1.0, 2, 8)])
def test_it_acts_once_where_a_step_begins(start: float, order: int, at: int) -> None:
    """A scheduler of order 2 is called twice a step; between the calls, nothing may jump."""
    clean, noise = scene(frames=5)
    following = Following(trajectory=path_of(arc(5), start=start))
    acts, jumps = [], []
    for i in range(10):
        step = replace(step_of(clean, i, seeds=(1,)), order=order)
        x = i / 10 * clean + (1 - i / 10) * noise
        acts += [i] if not torch.equal(following.latents(step, x), x) else []
        jumps += [i] if following.jumps(step) else []
    assert acts == jumps == [at]


def test_a_clip_does_not_depend_on_its_batch_and_other_seeds_fill_in_other_noise() -> None:
    clean, noise = scene(frames=5, clips=2)
    path = path_of(arc(5))
    both, *_ = moved(path, clean, noise, seeds=(1, 2))
    assert torch.equal(moved(path, clean[1:], noise[1:], seeds=(2,))[0], both[1:])
    assert not torch.equal(moved(path, clean[1:], noise[1:], seeds=(3,))[0], both[1:])
    assert not hook_of(arc(5)).resting().trajectory.points


def test_without_an_earlier_step_the_noise_itself_is_moved() -> None:
    noise = torch.randn(1, 2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    path = path_of([[-0.125, 0, 0], [0.125, 0, 0]], start=0.0)
    made = Following(trajectory=path).latents(step_of(None, 0, seeds=(1,)), noise)
    torch.testing.assert_close(made[..., 0, :, :14], noise[..., 0, :, 2:])
    torch.testing.assert_close(made[..., 1, :, 2:], noise[..., 1, :, :14])


def test_other_numbers_of_frames_show_the_whole_trajectory() -> None:
    clean, noise = scene(frames=5)
    made, signal, noisy = moved(path_of([[-0.25, 0.0, 0.0], [0.25, 0.0, 0.0]]), clean, 0 * noise + 1)
    bright = ((made - noisy) / signal)[0, 0, :, 8]
    centres = [(row > 90).nonzero().double().mean().item() for row in bright]
    assert centres == pytest.approx([3.5, 5.5, 7.5, 9.5, 11.5], abs=0.6)


def test_a_subject_near_an_edge_is_kept_in_view() -> None:
    """A bright square at the left would be moved out to the left; it starts farther right instead, by the smallest shift."""
    side, points = 20, np.array([[-0.2, 0, 0], [0.2, 0, 0]])
    clean = torch.zeros(1, 2, 2, side, side)
    clean[..., 8:12, 4:8] = 20  # its centre is at 0.3 of the width
    assert centre_of(subject_mask(clean[0])) == pytest.approx([0.3, 0.5], abs=0.03)
    out, signal, noisy = moved(path_of(points), clean, torch.ones_like(clean))
    row = ((out - noisy) / signal)[0, 0, :, 9]
    places = [((row[f] > 10).nonzero().double().mean().item() + 0.5) / side for f in (0, 1)]
    assert places == pytest.approx([0.2, 0.6], abs=0.03)


def test_the_subject_is_what_differs_from_its_row() -> None:
    """Found in noise, among rows of other values, and as at most half of the frame; with nothing to find, it is all of it."""
    side, draw = 32, torch.Generator().manual_seed(0)
    rows = torch.randn(4, 1, side, 1, generator=draw) * 3
    clean = rows + 0.3 * torch.randn(4, 3, side, side, generator=draw)
    truth = torch.zeros(side, side, dtype=torch.bool)
    truth[10:22, 4:14] = True
    clean[:, :, truth] += torch.randn(4, 1, int(truth.sum()), generator=draw) * 2 + 2
    found = subject_mask(clean)
    assert (found & truth).sum() / (found | truth).sum() > 0.7
    assert subject_mask(5 * clean).equal(found)
    assert subject_mask(torch.randn(4, 3, side, side, generator=draw)).double().mean() <= 0.5
    assert subject_mask(torch.zeros(4, 3, side, side)).all()
    assert centre_of(truth) == pytest.approx([9 / side, 16 / side])


def test_by_frame_all_frames_are_one_picture_whose_subject_moves(clip_model: Path) -> None:
    """The image layers see each frame by itself, as they do pictures; frames start from the same noise and see the first."""
    backbone: Any = load_backbone(clip_model)
    shape = backbone.latent_shape(32, 32, 3)
    x, t = torch.randn((2, *shape), generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
    words = backbone.encode(["a cup", "a dog"])
    with torch.no_grad():
        with backbone.image_layers():
            by_frame = backbone.predict(x, t, words)
        each = [backbone.predict(x[:, :, f], t, words) for f in range(3)]
        whole = backbone.predict(x, t, words)
    torch.testing.assert_close(by_frame, torch.stack(each, 2), atol=1e-5, rtol=1e-4)
    assert (whole - by_frame).abs().max() > 1e-2
    runner = VideoRunner(backbone)
    still, wide = [(0, 0, 0), (0, 0, 0)], [(-0.2, 0, 0), (0.2, 0, 0)]
    how = SamplingSettings("", 1.0, 4, height=32, width=32, frames=3)
    for points, layers, same in ((still, "image", True), (wide, "image", False), (still, "all", False)):
        hook = FollowTrajectory(name="m", trajectory=path_of(points, start=0.5, layers=layers))
        made = runner.generate(["a cup"], [0], replace(how, hooks=(hook,)))
        assert torch.allclose(made[:, :, :1].expand_as(made), made, atol=1e-4) is same, (points, layers)
    seen: list[Tensor] = []

    class Watching(SamplingHookBase):
        def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
            seen.append(latents)
            return latents

    hook = FollowTrajectory(name="m", trajectory=path_of(wide, start=0.5, layers="image"))
    # This scheduler adds noise in each step.
    runner.generate(["a cup"], [0], replace(how, scheduler="euler_a", hooks=(hook, Watching())))
    alike = [torch.equal(z[:, :, :1].expand_as(z), z) for z in seen]
    assert alike == [True, True, False, False]
    with torch.no_grad():
        assert torch.equal(backbone.predict(x, t, words), whole)  # the motion module is back


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


def test_layers_that_are_left_out_cannot_be_what_moves(
    learned: Path, clip_folder: Path, clip_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in a recipe that trains them, nor in a prompt that also names a motion they have learned."""
    asked = ["personalize", "motion_director", f"backbone={clip_model}", f"subject.clips={clip_folder}", *FAST]
    path = [f"output={tmp_path / 'lora.concept'}", "sampling.trajectory.layers=image"]
    assert run(app, [*asked, *path]) == 2
    assert "'image' leaves out the layers for motion, which trainable.temporal trains" in capsys.readouterr().err
    assert run(app, [*asked, path[0]]) == 0
    runner = VideoRunner(load_backbone(clip_model))
    for concept in (read(learned), read(tmp_path / "lora.concept")):
        runner.load(concept)
    how = SamplingSettings("", 1.0, 2, height=32, width=32, frames=4)
    with pytest.raises(ValueError, match=r"names <lora>, but <slide> leaves out the layers for motion"):
        runner.generate(["a <slide> <lora>"], [0], how)
    assert runner.generate(["a <slide>", "a <lora>"], [0, 1], how, must_name=False).shape[0] == 2


def test_a_motion_with_words_of_its_own_can_follow_a_path(clip_model: Path, clip_folder: Path, tmp_path: Path) -> None:
    """Words act on the image layers, so nothing is left out; a pan and a path together also make a clip."""
    asked = ["personalize", "motion_trajectory", f"backbone={clip_model}", f"subject.clips={clip_folder}", *FAST]
    words = ["modifier={kind: learnable_token, init: moving}", "trainable.words={kind: tokens}", "train.steps=1"]
    assert run(app, [*asked, *words, f"output={tmp_path / 'said.concept'}"]) == 0
    runner = VideoRunner(load_backbone(clip_model))
    runner.load(read(tmp_path / "said.concept"))
    how = SamplingSettings("", 1.0, 4, height=64, width=64, frames=4)
    plain = runner.generate(["a <said>"], [0], how)
    panned = runner.generate(["a <said>"], [0], replace(how, hooks=(CameraPan(right=0.5, start=0.2, end=0.6),)))
    assert panned.isfinite().all() and (panned - plain).abs().max() > 0.01


def test_a_model_without_image_layers_uses_all_and_says_so(clip_model: Path) -> None:
    path = ClipSampling(trajectory=path_of(arc(5), layers="image"))
    wan = WanBackbone(build_wan(), "tiny")
    assert (
        path.port(wan) == "sampling.trajectory.layers: wan has no layers of its own for motion, so all its layers act"
    )
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


def test_clips_without_the_motion_are_generated_once_for_many_motions(
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
    assert files[0] == files[1] and costs[0] == costs[1]  # the time they took, not that of finding them
    a, b, plain = "a red mug <slide> on the beach", "a red mug <hop> on the beach", "a red mug on the beach"
    assert sorted(made) == sorted([(False, a), (False, b), (False, plain), (True, plain)])


def test_a_picture_model_alone_moves_its_subject_along_a_trajectory_and_nothing_else(
    make_tiny_sd: Callable[..., Any], clip_folder: Path, tmp_path: Path
) -> None:
    """Learned, followed, named in the file; without the motion's name, the clip stands still, and that is said."""
    make_tiny_sd().save_pretrained(tmp_path / "sd")
    model = [f"backbone={tmp_path / 'sd'}", "motion_adapter=none"]
    asked = ["personalize", "motion_trajectory", *model, f"subject.clips={clip_folder}", *FAST, "train.steps=0"]
    assert run(app, [*asked, f"output={tmp_path / 'slide.concept'}", "sampling.steps=4"]) == 0
    made = ["generate", "a <slide>", "a cup", "--concept", tmp_path / "slide.concept", "--motion-adapter", "none"]
    size = ["--out", tmp_path / "clips", "--height", "32", "--width", "32", "--frames", "4", "--steps", "4"]
    with pytest.warns(UserWarning, match="'a cup' names no trajectory, and without a motion module nothing else moves"):
        assert run(app, [str(a) for a in [*made, *size, "--format", "frames"]]) == 0
    moving, still = (
        torch.stack([torch.from_numpy(np.array(Image.open(f))).int() for f in sorted(folder.glob("*.png"))])
        for folder in sorted(p for p in (tmp_path / "clips").iterdir() if p.is_dir())
    )
    assert (still - still[:1]).abs().max() <= 1 and (moving - moving[:1]).abs().max() > 10
    backbone: Any = with_motion_adapter(load_backbone(tmp_path / "sd"), "none")
    x = torch.randn(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    words, t = backbone.encode(["a cup", "a dog"]), torch.tensor([500.0, 20.0])
    with torch.no_grad():
        each = torch.stack([backbone.predict(x[:, :, f], t, words) for f in range(3)], 2)
        torch.testing.assert_close(backbone.predict(x, t, words), each, atol=1e-5, rtol=1e-4)
    assert isinstance(backbone, Backbone) and backbone.reads == {"stable_diffusion"}
    asked[1] = "motion_director"
    assert run(app, [*asked, f"output={tmp_path / 'lora.concept'}", "train.steps=1"]) == 2
