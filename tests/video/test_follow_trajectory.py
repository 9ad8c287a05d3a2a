"""A clip's subject follows a trajectory during sampling, and background fills the gap that the subject leaves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pcs_video.backbones.picture_clips import PictureClipsBackbone
from pcs_video.motion.camera_pan import CameraPan
from pcs_video.motion.follow_trajectory import (
    Following,
    FollowTrajectory,
    centre_of,
    into_view,
    subject_mask,
    widened,
)
from pcs_video.runner import VideoRunner
from shared.backbones import load_backbone
from shared.io.trajectory_settings import Trajectory
from shared.sampling import DenoisingStep
from shared.sampling.settings import SamplingSettings
from tests.video.trajectories import arc, hook_of, path_of


class Mixing:
    """A fake backbone. At time t, its latents are (1 - t / 10) x signal + (t / 10) x noise."""

    frame_factor = 1

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t / 10, t / 10


def step_of(clean: Tensor | None, index: int, steps: int = 10, seeds: Sequence[int] = (1, 2)) -> DenoisingStep:
    backbone: Any = Mixing()
    noise = torch.zeros(1)
    t = torch.tensor(float(steps - index))
    return DenoisingStep(index, steps, t, backbone, ["a"] * len(seeds), tuple(seeds), noise, clean=clean)


def scene(side: int = 16, frames: int = 2, clips: int = 1) -> tuple[Tensor, Tensor]:
    """Returns clean latents and unit noise, both `[B, 2, f, S, S]`.

    The latents contain a square with numbered cells. Outside the square, all cells in a row have the same value.
    """
    rows = torch.arange(side, dtype=torch.float32)[:, None].expand(side, side)
    clean = torch.stack([rows, -rows])
    number = torch.arange(16, dtype=torch.float32).view(4, 4)
    clean[:, 6:10, 6:10] = torch.stack([100 + number, 200 + number])
    noise = torch.randn(clips, 2, frames, side, side, generator=torch.Generator().manual_seed(0))
    return clean[None, :, None].repeat(clips, 1, frames, 1, 1), noise


def moved(
    trajectory: Trajectory, clean: Tensor, noise: Tensor, index: int = 4, seeds: Sequence[int] = (1,)
) -> tuple[Tensor, float, float]:
    """Applies the hook at step `index` of 10. Returns the resulting latents and their shares of signal and noise."""
    signal, noisy = index / 10, 1 - index / 10
    step = step_of(clean, index, seeds=seeds)
    return Following(trajectory=trajectory).latents(step, signal * clean + noisy * noise), signal, noisy


def test_the_subject_follows_the_trajectory_and_the_background_does_not_move() -> None:
    """The square's cells keep their noise.

    In the area that the square has left, each row keeps its value and gets new noise. All other cells are unchanged.
    """
    side, points = 16, [[-0.25, 0.0, 0.0], [0.25, -0.125, 0.0]]
    clean, noise = scene(side)
    made, signal, noisy = moved(path_of(points), clean, noise)
    found = subject_mask(clean[0])
    assert found[6:10, 6:10].all() and found.sum() <= 36  # smoothing may add a one-cell border
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
        # in the area that the square has left, every row has the value of its left edge
        left = (made[0, :, frame] - signal * clean[0, :, frame, :, :1]) / noisy
        assert behind.sum() > 10 and left[:, behind].abs().max() < 5
        assert (left - noise[0, :, frame])[:, behind].abs().min() > 1e-4


def test_frames_need_not_be_square() -> None:
    """Shifts are fractions of the width or the height, so 0.2 of the width covers more cells than 0.2 of the height."""
    clean, noise = torch.zeros(1, 1, 2, 10, 20), torch.ones(1, 1, 2, 10, 20)
    clean[..., 4:6, 9:11] = 100
    made, signal, _ = moved(path_of([[-0.2, 0, 0], [0, 0.2, 0]]), clean, noise)
    bright = [(made[0, 0, f] / signal > 50).nonzero().double().mean(0).tolist() for f in (0, 1)]
    assert bright == [[4.5, 5.5], [6.5, 9.5]]


def test_a_shift_by_half_a_cell_interpolates_clean_latents_but_not_noise() -> None:
    clean, noise = scene()
    # frame 0 is shifted by half a cell, and frame 1 is not shifted
    made, signal, noisy = moved(path_of([[1 / 32, 0, 0], [0, 0, 0]]), clean, noise)
    torch.testing.assert_close(made[:, :, 1], (signal * clean + noisy * noise)[:, :, 1], atol=1e-3, rtol=0)
    mean = (clean[0, :, 0, 6:10, 6:9] + clean[0, :, 0, 6:10, 7:10]) / 2  # each value is the mean of two cells
    left = (made[0, :, 0, 6:10, 7:10] - signal * mean) / noisy
    assert (left - noise[0, :, 0, 6:10, 7:10]).abs().max() < 1e-3  # each cell gets the noise of the nearest cell


def test_a_size_change_is_centred_on_the_subject_and_does_not_stretch_its_noise() -> None:
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
    outer[4:44, :36] = False  # the mask has a border, which is also enlarged
    torch.testing.assert_close(left[:, outer], noise[0, :, 1][:, outer], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("start", "order", "at"), [(0.3, 1, 3), (0.0, 1, 0), (1.0, 1, 9), (0.3, 2, 4), (1.0, 2, 8)])
def test_the_hook_changes_the_latents_once_at_the_beginning_of_a_step(start: float, order: int, at: int) -> None:
    """A scheduler of order 2 is called twice per step, and the latents must not jump between the two calls."""
    clean, noise = scene(frames=5)
    following = Following(trajectory=path_of(arc(5), start=start))
    acts, jumps = [], []
    for i in range(10):
        step = replace(step_of(clean, i, seeds=(1,)), order=order)
        x = i / 10 * clean + (1 - i / 10) * noise
        acts += [i] if not torch.equal(following.latents(step, x), x) else []
        jumps += [i] if following.jumps(step) else []
    assert acts == jumps == [at]


def test_a_moved_clip_depends_on_its_seed_but_not_on_its_batch() -> None:
    clean, noise = scene(frames=5, clips=2)
    path = path_of(arc(5))
    both, *_ = moved(path, clean, noise, seeds=(1, 2))
    assert torch.equal(moved(path, clean[1:], noise[1:], seeds=(2,))[0], both[1:])
    assert not torch.equal(moved(path, clean[1:], noise[1:], seeds=(3,))[0], both[1:])
    assert not hook_of(arc(5)).resting().trajectory.points


def test_only_noise_is_moved_if_there_is_no_earlier_step() -> None:
    noise = torch.randn(1, 2, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    path = path_of([[-0.125, 0, 0], [0.125, 0, 0]], start=0.0)
    made = Following(trajectory=path).latents(step_of(None, 0, seeds=(1,)), noise)
    torch.testing.assert_close(made[..., 0, :, :14], noise[..., 0, :, 2:])
    torch.testing.assert_close(made[..., 1, :, 2:], noise[..., 1, :, :14])


def test_clips_of_any_length_show_the_whole_trajectory() -> None:
    clean, noise = scene(frames=5)
    made, signal, noisy = moved(path_of([[-0.25, 0.0, 0.0], [0.25, 0.0, 0.0]]), clean, 0 * noise + 1)
    bright = ((made - noisy) / signal)[0, 0, :, 8]
    centres = [(row > 90).nonzero().double().mean().item() for row in bright]
    assert centres == pytest.approx([3.5, 5.5, 7.5, 9.5, 11.5], abs=0.6)


def test_a_subject_near_an_edge_is_kept_in_view() -> None:
    """A bright square would come too close to the left edge of the frame.

    Its trajectory is shifted to the right by the smallest sufficient distance.
    """
    side, points = 20, np.array([[-0.2, 0, 0], [0.2, 0, 0]])
    clean = torch.zeros(1, 2, 2, side, side)
    clean[..., 8:12, 4:8] = 20  # its centre is at 0.3 of the width
    assert centre_of(subject_mask(clean[0])) == pytest.approx([0.3, 0.5], abs=0.03)
    out, signal, noisy = moved(path_of(points), clean, torch.ones_like(clean))
    row = ((out - noisy) / signal)[0, 0, :, 9]
    places = [((row[f] > 10).nonzero().double().mean().item() + 0.5) / side for f in (0, 1)]
    assert places == pytest.approx([0.2, 0.6], abs=0.03)


def test_the_subject_mask_selects_cells_that_differ_from_their_row() -> None:
    """The subject is found despite noise and despite differences between rows.

    The mask covers at most half of the frame, or the whole frame if the latents are uniform.
    """
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


def test_frames_generated_with_image_layers_show_one_picture_whose_subject_moves(clip_model: Path) -> None:
    """The image layers treat each frame as a separate picture.

    During sampling, all frames start from the same noise and also attend to the first frame.
    """
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
    hook = FollowTrajectory(name="m", trajectory=path_of(wide, start=0.5, layers="image"))
    with pytest.raises(ValueError, match="euler_a adds different noise to each frame, so without a motion module"):
        runner.generate(["a cup"], [0], replace(how, scheduler="euler_a", hooks=(hook,)))
    with torch.no_grad():
        assert torch.equal(backbone.predict(x, t, words), whole)  # the motion module is in use again


def test_a_camera_pan_works_on_frames_that_show_one_picture(make_tiny_sd: Callable[..., Any]) -> None:
    """Without motion modules, only hooks cause differences between frames. These differences are kept."""
    runner = VideoRunner(PictureClipsBackbone(make_tiny_sd(), "tiny"))
    how = SamplingSettings("", 1.0, 5, height=64, width=64, frames=3, hooks=(CameraPan(right=0.5, start=0.2, end=0.6),))
    (made,) = runner.generate(["a cup"], [0], how)
    assert (made[:, 2] - made[:, 0]).abs().max() > 0.1
    (still,) = runner.generate(["a cup"], [0], replace(how, hooks=()))
    assert torch.allclose(still[:, 2], still[:, 0], atol=1e-4)


def test_the_shift_into_view_is_the_smallest_possible() -> None:
    path = np.array([[-0.2, -0.4], [0.2, 0.4]])
    assert into_view(np.array([0.5, 0.5]), path, 0.2) == pytest.approx([0, 0])
    # the path is too tall for the frame, so it is centred vertically
    assert into_view(np.array([0.3, 0.9]), path, 0.2) == pytest.approx([0.1, -0.4])
    assert into_view(np.array([0.7, 0.5]), path, 0.2) == pytest.approx([-0.1, 0])
