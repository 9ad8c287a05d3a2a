"""A camera pan shifts latents by the right distance, fills the gaps, and treats each clip in a batch separately."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pcs_video.backbones.animatediff import AnimateDiffBackbone
from pcs_video.motion.camera_pan import CameraPan, shifted
from shared.sampling import DenoisingStep, denoise
from shared.sampling.sampler import sample
from shared.sampling.settings import SamplingSettings
from tests.video.clip_models import build_animatediff
from tests.video.transformer_runs import noise


def run(pan: CameraPan, x: Tensor, steps: int = 20, seeds: tuple[int, ...] = (1, 2)) -> Tensor:
    backbone: Any = type("Frames", (), {"frame_factor": 1})()
    for i in range(steps):
        x = pan.latents(DenoisingStep(i, steps, torch.tensor(0), backbone, ["a", "b"], seeds, x), x)
    return x


@pytest.mark.parametrize(("right", "down"), [(0.5, 0.0), (-0.25, 0.0), (0.0, 0.5), (0.25, -0.25)])
def test_each_frame_is_shifted_by_its_share_of_the_pan(right: float, down: float) -> None:
    """Each latent value is its position's index, so a value that was not filled in reveals where it came from."""
    side, frames = 16, 5
    place = torch.arange(side * side, dtype=torch.float32).view(1, 1, 1, side, side)
    made = run(CameraPan(right=right, down=down), place.repeat(2, 1, frames, 1, 1))
    for frame in range(frames):
        dx, dy = round(right * side * frame / 4), round(down * side * frame / 4)
        rows = range(max(0, -dy), min(side, side - dy))
        columns = range(max(0, -dx), min(side, side - dx))
        for y in rows:
            for x in columns:
                assert made[0, 0, frame, y, x] == (y + dy) * side + x + dx


def test_a_scheduler_with_two_calls_per_step_is_not_disturbed_between_the_calls() -> None:
    """The latents move only at the beginning of a step, when the scheduler's history is discarded."""
    pan, x = CameraPan(right=0.5, start=0.1, end=0.5), torch.randn(1, 1, 5, 16, 16)
    backbone: Any = type("Frames", (), {"frame_factor": 1})()
    made, jumps = x, []
    for i in range(20):
        step = DenoisingStep(i, 20, torch.tensor(0), backbone, ["a"], (1,), x, order=2)
        after = pan.latents(step, made)
        assert pan.jumps(step) or torch.equal(after, made)
        jumps += [i] if pan.jumps(step) else []
        made = after
    assert jumps == [2, 4, 6, 8]
    assert torch.equal(made[0, 0, 4, :, :8], x[0, 0, 4, :, 8:])


def test_gaps_are_filled_from_the_same_row_or_column_and_from_outside_the_boxes() -> None:
    draw = torch.Generator().manual_seed(0)
    plane = torch.arange(64, dtype=torch.float32).view(1, 8, 8)
    source = torch.ones(8, 8, dtype=torch.bool)
    source[:, 2:7] = False  # a subject's box
    right = shifted(plane, 3, 2, source, draw)
    assert torch.equal(right[0, :, :5], plane[0, :, 3:])
    for y in range(8):
        assert {int(v) - 8 * y for v in right[0, y, 5:]} <= {0, 1, 7}
    up = shifted(plane, -2, 1, source, draw)
    assert torch.equal(up[0, 2:], plane[0, :-2])
    assert all(int(v) % 8 == x for x in range(8) for v in up[0, :2, x])
    # if no cell is allowed as a source, any cell is used
    assert shifted(plane, 20, 2, torch.zeros_like(source), draw).shape == plane.shape


def test_a_pan_keeps_the_variance_and_does_not_depend_on_the_batch() -> None:
    x = noise(2, 4, 8, 32, 32)
    pan = CameraPan(right=0.5, down=0.25)
    moved = run(pan, x)
    assert moved.var().item() == pytest.approx(1, abs=0.03) and torch.equal(moved[:, :, 0], x[:, :, 0])
    assert torch.equal(run(pan, x[1:], seeds=(2,)), moved[1:])
    assert not torch.equal(run(pan, x, seeds=(1, 3))[1], moved[1])


def test_a_clip_is_sampled_with_a_camera_pan(make_tiny_sd: Any) -> None:
    clips = AnimateDiffBackbone(build_animatediff(make_tiny_sd()), "tiny")
    how: dict[str, Any] = {"guidance": 1.0, "steps": 2, "frames": 4}

    def ask(pan: CameraPan) -> Tensor:
        *_, last = denoise(clips, ["a mug"], seeds=[1], settings=SamplingSettings(**how, hooks=(pan,)))
        return last.latents

    still = ask(CameraPan())
    # with so few steps, the entire pan happens in one of them
    assert (ask(CameraPan(right=0.5)) - still).abs().max() > 0.01
    for pan, frames, message in [
        (CameraPan(right=0.5), 0, "a camera can move only in a clip, not in a picture"),
        (CameraPan(right=0.01), 4, "moves by less than one of the 8x8 latent cells; use 0.12 or more"),
        (
            CameraPan(right=0.5, boxes={"mug": {9: [0, 0, 1, 1]}}),
            4,
            r"go up to frame 9 \(counted from 0\), but only 4 frames are generated",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            sample(clips, ["a mug"], seeds=[1], settings=SamplingSettings(steps=2, frames=frames, hooks=(pan,)))
    with pytest.raises(ValueError, match="start = 0.5 must be below end = 0.3"):
        CameraPan(right=0.1, start=0.5)
