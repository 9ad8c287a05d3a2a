"""Trajectories are measured on clips, with and without masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pcs_video.motion.clip_source import Clips
from pcs_video.motion.trajectory import measure
from shared.io.clips.window import ClipWindow
from shared.io.trajectory_settings import Trajectory
from shared.toybox.motions.reference_clips import write_frames
from shared.types import Subject
from tests.video.trajectories import SIDE, arc, drawn


def source(length: int = 8) -> Clips:
    return Clips(window=ClipWindow(length=length))


def subject_of(folder: Path, path: np.ndarray, masked: bool) -> Subject:
    frames, masks = drawn(path)
    write_frames(frames.transpose(0, 1), folder / "a", {})
    if masked:
        write_frames(masks[:, None].expand(-1, 3, -1, -1) * 2 - 1, folder / "masks", {})
    return Subject((), "", {}, {folder / "a": folder / "masks"} if masked else {}, (folder / "a",))


@pytest.mark.parametrize("growth", [0.0, 0.5])
def test_centre_and_size_are_measured_from_masks(tmp_path: Path, growth: float) -> None:
    truth = arc(growth=growth)
    found = np.array(measure(subject_of(tmp_path, truth, True), source(), SIDE))
    assert found == pytest.approx(truth - truth.mean(0), abs=0.02)


def test_moving_points_are_tracked_if_there_are_no_masks(tmp_path: Path) -> None:
    truth = arc(12)
    found = np.array(measure(subject_of(tmp_path, truth, False), source(12), SIDE))
    assert found[:, :2] == pytest.approx((truth - truth.mean(0))[:, :2], abs=0.04)
    assert np.abs(found[:, 2]).max() < 0.1


def test_clips_are_averaged_around_their_own_means(tmp_path: Path) -> None:
    """Two clips of the same motion at different positions give the same trajectory as one of them alone."""
    paths = [arc(), arc() + np.array([0.1, -0.1, 0])]
    both = [subject_of(tmp_path / str(i), path, True) for i, path in enumerate(paths)]
    masks = {**both[0].masks, **both[1].masks}
    together = measure(Subject((), "", {}, masks, (*both[0].clips, *both[1].clips)), source(), SIDE)
    assert np.array(together) == pytest.approx(np.array(measure(both[0], source(), SIDE)), abs=0.01)


@pytest.mark.parametrize("masked", [True, False])
def test_a_subject_that_does_not_move_has_no_trajectory(tmp_path: Path, masked: bool) -> None:
    still = np.tile([0.5, 0.5, 0.0], (8, 1))
    with pytest.raises(
        ValueError, match=r"sampling.trajectory: nothing moves across the frame in .*a; leave this clip out"
    ):
        measure(subject_of(tmp_path, still, masked), source(), SIDE)


def test_the_strength_scales_a_trajectory_within_bounds() -> None:
    path = Trajectory(points=((0.5, -0.25, 0.1), (1.5, 0.0, 0.0)))
    assert path.scaled(0.5).points == ((0.25, -0.125, 0.05), (0.75, 0.0, 0.0))
    assert path.scaled(3).points[1][0] == 2.0
