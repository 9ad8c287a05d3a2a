"""The toybox's motions are functions of time and keep things in the picture. No training path comes near a held-out
motion."""

from __future__ import annotations

import numpy as np
import pytest

from shared.toybox.motions.captioned import CAMERA_MOTIONS, MOTIONS, captioned_motion
from shared.toybox.motions.held_out import SPLITS, held_out_motion, held_out_motions, motion_names
from shared.toybox.motions.look_alikes import GAP, candidates, look_alikes
from shared.toybox.motions.motion import PATH, Array, views
from shared.toybox.motions.path_distance import distance, distances, ranked
from shared.toybox.motions.placing import place, room, sample_paths

EVERY = {**MOTIONS, **motion_names()}
DRAWN = 1000


@pytest.fixture(scope="module")
def training() -> dict[str, Array]:
    """Draws 10,000 training paths, grouped by motion."""
    rng = np.random.default_rng(0)
    return {name: sample_paths(rng, motion, DRAWN) for name, motion in MOTIONS.items()}


def test_there_are_enough_held_out_motions_in_each_split() -> None:
    assert len(MOTIONS) >= 8
    assert [len(held_out_motions(split)) for split in SPLITS] == [6, 6]
    assert len({motion.name for motion in EVERY.values()}) == len(EVERY), "every name is unique"
    with pytest.raises(ValueError, match="Did you mean 'development-zigzag'"):
        held_out_motion("development-zigzig")
    with pytest.raises(ValueError, match="captioned motion"):
        captioned_motion("zigzag")
    with pytest.raises(ValueError, match="held-out split"):
        held_out_motions("train")


@pytest.mark.parametrize("name", EVERY)
def test_a_motion_is_a_function_of_time_for_any_number_of_frames(name: str) -> None:
    motion, rng = EVERY[name], np.random.default_rng(1)
    drawn = motion.draw(rng, 3)
    few, many = motion.offsets(drawn, 8), motion.offsets(drawn, 15)
    assert few.dtype == np.float64 and few.shape == (3, 8, 7)
    assert np.allclose(few, many[:, ::2])
    assert motion.offsets(drawn, 2).shape == (3, 2, 7)
    with pytest.raises(ValueError, match="at least 2 frames, not 1"):
        motion.offsets(drawn, 1)
    assert (few[..., 6].any() and name in CAMERA_MOTIONS) or not few[..., 6].any(), (
        "only camera motions move the background"
    )


@pytest.mark.parametrize("name", EVERY)
def test_things_stay_in_the_picture_and_turn_slowly_enough_to_be_tracked(name: str) -> None:
    paths = sample_paths(np.random.default_rng(2), EVERY[name], 300, frames=8)
    scale, away = np.exp(paths[..., 2]), np.abs(paths[..., :2]).max(-1)
    assert scale.min() > 0.4 and scale.max() < 1.1 and (away <= room(scale) + 1e-9).all()
    assert np.abs(paths[..., 5]).max() < 40 and np.ptp(paths[..., 4], axis=1).max() == 0
    assert np.abs(np.diff(paths[..., 3], axis=1)).max() < 90, "a turn of 90° or more between frames is hard to track"


def test_things_face_their_direction_of_motion_if_the_motion_requires_it() -> None:
    """A lap starts with the thing moving right, seen from its right side. At azimuth -90°, its front points right."""
    lap = held_out_motion("reporting-lap")
    path = place(np.random.default_rng(0), lap.offsets(lap.draw(np.random.default_rng(0), 5), 41), lap.facing_deg)
    assert np.allclose(path[:, 0, 3], -90) and (np.diff(path[:, :2, 0], axis=1) > 0).all()
    assert np.allclose(views(path)[:, 10, :2] / np.cos(np.radians(path[:, 10, 4:5])), (-1, 0)), (
        "a quarter of the way through the lap, the thing is seen from behind"
    )
    assert (np.diff(path[:, 10:12, 2], axis=1) < 0).all(), "a quarter of the way through the lap, the thing moves away"


def test_views_are_unit_vectors_towards_the_camera() -> None:
    path = np.zeros((4, len(PATH)))
    path[:, 3], path[:, 4] = (0, 90, 180, 30), (0, 0, 0, 90)
    assert np.allclose(views(path), [(1, 0, 0), (0, 1, 0), (-1, 0, 0), (0, 0, 1)], atol=1e-12)


def test_no_training_path_comes_near_a_held_out_motion(training: dict[str, Array]) -> None:
    """For 99% of the training paths, the nearest other path of the same motion is closer than `bar`.

    Every training path is more than twice that distance from every held-out motion.
    """
    within = []
    for paths in training.values():
        far = distances(paths, paths)
        np.fill_diagonal(far, np.inf)
        within.append(far.min(1))
    bar = np.quantile(np.concatenate(within), 0.99)
    every, rng = np.concatenate(list(training.values())), np.random.default_rng(3)
    assert len(every) == 10_000
    for name, motion in motion_names().items():
        assert distances(motion.path()[None], every).min() > 2 * bar, f"{name}, the median draw"
        assert distances(sample_paths(rng, motion, 30), every).min() > 2 * bar, f"{name}, any draw"
    held = motion_names().values()
    assert min(distance(a.path(), b.path()) for a in held for b in held if a is not b) > 1, (
        "held-out motions are not near each other either"
    )


def test_captioned_motions_can_be_told_apart_by_their_paths(training: dict[str, Array]) -> None:
    """Paths of different training motions are more than 0.4 apart, whatever their side, size, position or rhythm."""
    names, every = np.repeat(list(training), DRAWN), np.concatenate(list(training.values()))
    for name, paths in training.items():
        far = distances(paths[:40], every)
        far[:, names == name] = np.inf
        assert far.min() > 0.4, f"{name} is near {names[far.min(0).argmin()]}"


@pytest.mark.parametrize("name", motion_names())
def test_a_held_out_motion_can_be_told_apart_from_its_look_alikes(name: str) -> None:
    motion, split = held_out_motion(name), name.split("-")[0]
    known = {other.name: other.path() for other in look_alikes(motion)}
    assert len(known) >= 4
    for title, path in known.items():
        assert distance(path, motion.path()) > GAP
        assert all(distance(path, other) > GAP for also, other in known.items() if also != title)
    among = candidates(motion, split, 12)
    assert next(iter(among)) == motion.name and len(among) == 1 + len(known) + 5 + 1
    for path in sample_paths(np.random.default_rng(4), motion, 40, 12):
        assert ranked(path, among)[0][0] == motion.name
        noisy = path + np.random.default_rng(5).normal(0, 1, path.shape) * (0.03, 0.03, 0.08, 15, 5, 4)
        assert ranked(noisy, among)[0][0] == motion.name
    frozen = np.repeat(path[:1], 12, 0)
    assert ranked(frozen, among)[0][0] == "still"


def test_the_steady_look_alike_of_a_motion_never_stops() -> None:
    motion = held_out_motion("development-stop-and-go")
    steady = next(other for other in look_alikes(motion) if other.name.endswith("steady"))
    x = steady.path(16)[:, 0]
    assert np.allclose(np.diff(x), x[-1] / 15, rtol=0.02) and np.isclose(x[-1], motion.path()[-1, 0])
