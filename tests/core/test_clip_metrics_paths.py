"""Held-out motions are recognized by their paths and told apart from look-alikes. Path errors are measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shared.io.clips.write_clip import write_clip
from shared.metrics.clips.paths import KnownMotion, known_motion, path_error, recognition_ceiling, recognized
from shared.metrics.clips.scorer import ClipScorer
from shared.toybox.motions.held_out import motion_names
from shared.toybox.motions.look_alikes import look_alikes
from shared.toybox.motions.motion import Array, still
from shared.toybox.motions.path_distance import UNITS
from shared.toybox.motions.placing import sample_paths
from shared.toybox.motions.reference_clips import KEY, write_motion

KNOWN = {name: KnownMotion(name, motion) for name, motion in motion_names().items()}


def noisy(path: Array, seed: int, amount: float = 0.3) -> Array:
    """Returns the path as an estimator would report it, with an error of a fraction of a unit in every frame."""
    rng = np.random.default_rng(seed)
    return path + amount * rng.normal(0, 1, path.shape) * list(UNITS.values())


@pytest.mark.parametrize("name", list(KNOWN))
def test_a_motion_is_recognized_from_any_starting_point_and_its_look_alikes_are_not(name: str) -> None:
    known, rng = KNOWN[name], np.random.default_rng(0)
    for frames in (16, 12):
        for i, path in enumerate(sample_paths(rng, known.motion, 2, frames)):
            assert known.is_shown(noisy(path, i))[0]
        for other in look_alikes(known.motion):
            hit, found = known.is_shown(noisy(other.path(frames), 9))
            assert not hit and found.name == other.name and found.margin > 0


def test_the_candidates_include_look_alikes_stillness_and_the_other_motions_of_the_split() -> None:
    for known in KNOWN.values():
        names = list(known.candidates(16))
        others = [m.motion.name for n, m in KNOWN.items() if m.split == known.split and n != known.name]
        assert names[0] == known.motion.name and set(others) < set(names) and "still" in names
        assert len(look_alikes(known.motion)) >= 4 and known.chance == 1 / len(names) <= 1 / 11
        assert known.is_shown(still(16))[1].name == "still"
    with pytest.raises(ValueError, match="but there are none"):
        recognized(still(4), {})


def test_path_errors_are_in_pixels_and_degrees_and_ignore_constant_shifts() -> None:
    truth = KNOWN["development-hop-and-turn"].motion.path(16)
    moved = truth + np.array([0.1, -0.2, 0.4, 350.0, 5.0, -7.0])
    assert max(vars(path_error(moved, truth, 64)).values()) < 1e-6
    bent = moved.copy()
    signs = np.resize([1.0, -1.0], 16)
    for column, by in enumerate((3 / 64, 4 / 64, 0.1, 2.0, 3.0, 5.0)):
        bent[:, column] += signs * by
    error = path_error(bent, truth, 64)
    assert vars(error) == pytest.approx(
        {"position_px": 5, "scale": 0.1, "azimuth_deg": 2, "elevation_deg": 3, "roll_deg": 5}, rel=1e-6
    )
    # Every third frame is compared with the truth at the same times.
    assert path_error(truth[::3], truth, 64).position_px < 1e-6


def test_clips_record_which_motion_they_show(tmp_path: Path) -> None:
    frames = write_motion("reporting-loop", tmp_path / "loop", 2, frames=2)
    found = known_motion(frames)
    assert found is not None and (found.name, found.split, found.motion.name) == ("reporting-loop", "reporting", "loop")
    clip = torch.rand(3, 3, 32, 32)
    video = write_clip(tmp_path / "v.mp4", clip, 8, {KEY: "reporting-loop"})
    other = write_clip(tmp_path / "w.mp4", clip, 8, {KEY: "reporting-lap"})
    plain = write_clip(tmp_path / "p.gif", clip, 8)
    assert known_motion([*frames, video]) == found
    for files in ([video, other], [video, plain], [plain], [tmp_path / "none.mp4"], []):
        assert known_motion(files) is None


class Says:
    """A reader that returns the same path for every clip."""

    def __init__(self, path: Array) -> None:
        self.path, self.seen = path, []

    def __call__(self, frames: Tensor) -> Array:
        self.seen.append(frames)
        return self.path


def test_the_recognition_ceiling_is_the_share_of_true_clips_that_are_recognized() -> None:
    known = KNOWN["development-zigzag"]
    right, wrong = Says(known.motion.path(3)), Says(still(3))
    assert recognition_ceiling(right, known, 3, clips=2, through=lambda pixels: pixels / 2) == 1
    assert recognition_ceiling(wrong, known, 3, clips=2) == 0
    assert all(clip.shape == (3, 3, 64, 64) for clip in (*right.seen, *wrong.seen))
    assert torch.equal(right.seen[0], wrong.seen[0] / 2) and not torch.equal(wrong.seen[0], wrong.seen[1])


def test_a_ceiling_is_measured_once_per_autoencoder_motion_and_reader() -> None:
    known, other = KNOWN["development-zigzag"], KNOWN["development-spiral"]
    right, wrong = Says(known.motion.path(3)), Says(still(3))
    measured = [
        recognition_ceiling(reader, motion, 3, clips=2, through_key=autoencoder)
        for reader, motion, autoencoder in (
            (right, known, "a"), (right, known, "a"), (right, known, "b"), (right, other, "a"), (wrong, known, "a"),
        )
    ]  # fmt: skip
    assert measured == [1, 1, 1, 0, 0] and (len(right.seen), len(wrong.seen)) == (6, 2)


def test_a_clip_is_scored_by_the_path_read_from_it() -> None:
    known = KNOWN["development-zigzag"]
    clip = torch.rand(1, 3, 6, 32, 32, generator=torch.Generator().manual_seed(0))
    true = known.motion.path(6)
    measured = ClipScorer(known=known, reader=Says(true + 0.3)).measure(clip, ["a mug"])
    assert measured.scores["motion_recognised"] == [1.0] and measured.moves_like == ["zigzag"]
    assert measured.scores["error_position_px"][0] == pytest.approx(0, abs=1e-9)
    measured = ClipScorer(known=known, reader=Says(true[::-1])).measure(clip, ["a mug"])
    assert measured.scores["motion_recognised"] == [0.0] and measured.moves_like == ["zigzag, reversed"]
    assert measured.scores["error_position_px"][0] > 5
