"""Flow and tracks match known motion. Motion fidelity matches its formula and distinguishes clips by their motion."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.metrics.clips.flow_fields import flow_fields
from shared.metrics.clips.motion_fidelity import STILL, motion_fidelity, resampled
from shared.metrics.clips.tracks import Tracks, follow, track_points
from shared.toybox.motions.captioned import captioned_motion
from shared.toybox.motions.clips import Clip, draw_clip, sample_moving
from tests.core.moving_patches import along, moving_patch, panned, texture, tracks_of


def drawn(motion: str, seed: int, frames: int = 6) -> Clip:
    return draw_clip(sample_moving(np.random.default_rng(seed), captioned_motion(motion), frames))


def pixels(clip: Clip) -> Tensor:
    return clip.frames.permute(3, 0, 1, 2) * 2 - 1


@pytest.fixture(scope="module")
def right() -> Clip:
    return drawn("slide right", 0)


@pytest.mark.parametrize(("size", "step"), [((64, 64), (2, -1)), ((48, 80), (-3, 0)), ((300, 280), (4, 4))])
def test_points_inside_a_mask_follow_the_patch(size: tuple[int, int], step: tuple[int, int]) -> None:
    side = 20 if max(size) < 100 else 80
    clip = moving_patch(step, size=size, side=side)
    mask = torch.zeros(1, *size)
    top, left = (round((n - side) / 2 - 2 * s) for n, s in zip(size, reversed(step), strict=True))
    mask[:, top + 4 : top + side - 4, left + 4 : left + side - 4] = 1
    found = track_points(clip, mask)
    assert len(found.points) >= 16 and found.visible.all()
    start = found.points[:, 0]
    assert (mask[0, start[:, 1].round().long(), start[:, 0].round().long()] == 1).all()
    expected = start[:, None] + torch.arange(5.0)[None, :, None] * torch.tensor(step, dtype=torch.float64)
    assert (found.points - expected).norm(dim=2).median() < 0.2


def test_points_that_are_covered_or_leave_the_frame_stay_lost() -> None:
    found = track_points(moving_patch((4, 0), frames=6, side=24))
    seen = found.visible.int()
    assert (seen.diff(dim=1) <= 0).all() and seen[:, 0].all()
    x, y = found.points[:, 0].unbind(1)
    # The right edge of the patch moves from x = 34 to 54, so the patch gradually covers the background between them.
    covered = (x > 40) & (x < 52) & (y > 24) & (y < 40)
    assert covered.any() and seen[covered, -1].double().mean() < 0.1
    far = (y < 10) | (y > 54)
    assert seen[far, -1].all()
    gone = track_points(panned(6, frames=4))
    leaves = gone.points[:, 0, 0] < 12  # 18 pixels to the left in three steps
    assert not gone.visible[leaves, -1].any() and gone.visible[~leaves & (gone.points[:, 0, 0] > 24), -1].all()


def test_estimated_flow_matches_the_rendered_flow(right: Clip) -> None:
    fields = flow_fields(pixels(right))
    assert fields.forward.shape == (5, 256, 256, 2) and fields.cells_per_pixel == 4
    found = torch.nn.functional.avg_pool2d(fields.forward.permute(0, 3, 1, 2), 4).permute(0, 2, 3, 1) / 4
    sure = right.flow_known & (right.mask[:-1] > 0.9)
    assert right.flow[sure].norm(dim=1).median() > 2
    assert (found - right.flow)[sure].norm(dim=1).median() < 0.3


def test_unusable_masks_and_clips_are_refused() -> None:
    clip = moving_patch((1, 0))
    with pytest.raises(ValueError, match=r"a mask of shape \[1, 32, 32\] does not match frames of 64x64"):
        track_points(clip, torch.ones(1, 32, 32))
    with pytest.raises(ValueError, match="the mask of the first frame is empty"):
        track_points(clip, torch.zeros(64, 64))
    with pytest.raises(ValueError, match=r"must have shape \[3, F, H, W\]"):
        track_points(clip.transpose(0, 1))
    with pytest.raises(ValueError, match="not finite"):
        track_points(clip * torch.nan)


def by_the_formula(a: list[list[list[float]]], b: list[list[list[float]]], e: float) -> float:
    """Evaluates equations 8 and 9 of the Space-Time Features paper, with e² added to each inner product.

    Takes displacements `[N][F-1][2]` and returns the mean over both directions.
    """

    def match(one: list[list[float]], two: list[list[float]]) -> float:
        each = []
        for (x, y), (u, v) in zip(one, two, strict=True):
            each.append((x * u + y * v + e * e) / math.sqrt((x * x + y * y + e * e) * (u * u + v * v + e * e)))
        return sum(each) / len(each)

    there = sum(max(match(one, two) for two in b) for one in a) / len(a)
    back = sum(max(match(one, two) for one in a) for two in b) / len(b)
    return (there + back) / 2


def test_fidelity_averages_the_published_formula_over_both_directions() -> None:
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 6, 2, generator=draw, dtype=torch.float64) * 3 + 4 for n in (7, 5))
    expected = by_the_formula(a.tolist(), b.tolist(), 100 * STILL)
    assert motion_fidelity(tracks_of(a), tracks_of(b)) == pytest.approx(expected, abs=1e-12)
    assert motion_fidelity(tracks_of(b), tracks_of(a)) == pytest.approx(expected, abs=1e-12)
    assert motion_fidelity(tracks_of(a), tracks_of(a)) == 1.0
    # At twice the size, the clip has the same motion relative to the frame.
    assert motion_fidelity(tracks_of(2 * a, side=200), tracks_of(b)) == pytest.approx(expected, abs=1e-12)


def test_fidelity_is_one_for_the_same_movement_and_minus_one_for_the_opposite() -> None:
    right, still = along((5, 0), (4, 0)), along((0, 0), (0, 0))
    assert motion_fidelity(right, right) == motion_fidelity(still, still) == 1.0
    assert motion_fidelity(right, still) == motion_fidelity(still, right) == 0.0
    assert motion_fidelity(right, along((-5, 0))) == pytest.approx(-1, abs=0.02)
    assert motion_fidelity(right, along((0, 5))) == pytest.approx(0, abs=0.02)
    # Points that do not move are not counted. Otherwise, a still background alone would make any two clips alike.
    assert motion_fidelity(along((5, 0), *[(0, 0)] * 50), along((-5, 0), *[(0, 0)] * 50)) < -0.95
    assert motion_fidelity(along((5, 0), *[(0, 0)] * 50), still) == 0.0
    # The result is the mean over both directions of comparison. Here, one clip has a movement that the other lacks.
    both = along((5, 0), (-5, 0))
    assert motion_fidelity(both, along((5, 0))) == pytest.approx((0 + 1) / 2, abs=0.02)


def test_fidelity_compares_rhythm_and_accepts_clips_of_different_lengths() -> None:
    steady, halting = along((4, 0), frames=9), tracks_of(torch.tensor([[[8.0, 0]] * 4 + [[0, 0]] * 4]))
    assert 0.4 < motion_fidelity(steady, halting) < 0.6
    assert motion_fidelity(along((4, 0), frames=9), along((8, 0), frames=5)) == pytest.approx(1, abs=1e-6)
    shorter = resampled(along((4, 2), frames=9), 5)
    assert torch.allclose(shorter.points[0].diff(dim=0), torch.tensor([8.0, 4.0], dtype=torch.float64).expand(4, 2))
    with pytest.raises(ValueError, match="a clip of one frame"):
        motion_fidelity(along((1, 0), frames=1), steady)


def test_fidelity_uses_only_frames_where_both_tracks_are_visible() -> None:
    steps = torch.tensor([[[5.0, 0]] * 3 + [[-50.0, 0]] * 2])
    lost = torch.tensor([[True] * 4 + [False] * 2])
    assert motion_fidelity(tracks_of(steps, lost), along((5, 0), frames=6)) == pytest.approx(1, abs=1e-3)
    assert motion_fidelity(tracks_of(steps), along((5, 0), frames=6)) < 0.3
    hidden = tracks_of(steps, torch.zeros(1, 6, dtype=torch.bool))
    assert motion_fidelity(hidden, along((5, 0), frames=6)) == 0.0
    assert resampled(tracks_of(steps, lost), 3).visible.tolist() == [[True, True, False]]


def test_camera_movement_can_be_subtracted() -> None:
    ground = [(-6.0, 0.0)] * 8
    seen = along(*ground, (-1, 0))  # the object moves right by 5 pixels per frame, and the camera by 6
    fixed = along(*[(0.0, 0.0)] * 8, (5, 0))
    assert motion_fidelity(seen, fixed, compensate_camera=True) == pytest.approx(1)
    assert motion_fidelity(seen, fixed) < 0


def test_fidelity_distinguishes_rendered_clips_by_their_motion(right: Clip) -> None:
    """Compares a clip with four others.

    The others are a clip of another object with the same motion, a clip with the opposite motion, the same clip
    reversed, and its first frame frozen.
    """
    clip = pixels(right)
    again, left = (pixels(drawn(name, seed)) for name, seed in (("slide right", 3), ("slide left", 1)))
    one, two, other, back, still = (
        track_points(c) for c in (clip, again, left, clip.flip(1), clip[:, :1].repeat(1, 6, 1, 1))
    )
    assert motion_fidelity(one, one) == 1.0 and motion_fidelity(still, still) == 1.0
    assert motion_fidelity(one, two) > 0.85
    assert motion_fidelity(one, other) < 0.3 and motion_fidelity(one, back) < 0.3
    assert motion_fidelity(one, still) == 0.0


def test_tracks_with_mismatched_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected points \[N, F, 2\]"):
        Tracks(torch.zeros(3, 4, 2), torch.ones(3, 5, dtype=torch.bool), (8, 8))
    flat = follow(flow_fields(texture((32, 32), 0)[:, None]))
    assert flat.frames == 1 and flat.visible.all()
