"""The distance between paths matches a minimum found by search, and ignores where the paths begin."""

from __future__ import annotations

import numpy as np
import pytest

from shared.toybox.motions.motion import PATH, still
from shared.toybox.motions.path_distance import UNITS, distance, distances, ranked, resampled

SHIFT = np.array([0.2, -0.3, 0.5, 200.0, 12.0, -9.0])


def paths(n: int, frames: int = 9, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 1, (n, frames, len(PATH))) * list(UNITS.values())
    steps[..., 3] *= 3  # more than one full turn
    return steps.cumsum(1)


def test_the_distance_is_the_smallest_difference_over_all_shifts() -> None:
    """For each column separately, the expected value is the best of 200,001 shifts."""
    a, b = paths(2)
    total = 0.0
    for i, (name, unit) in enumerate(UNITS.items()):
        if name == "azimuth_deg":
            shifts = np.radians(np.linspace(0, 360, 200_001))[:, None]
            turn = np.exp(1j * np.radians(a[:, i])) - np.exp(1j * (np.radians(b[:, i]) + shifts))
            squares = np.abs(turn) ** 2 / (2 * np.sin(np.radians(unit) / 2)) ** 2
        else:
            gap = (a[:, i] - b[:, i]) / unit
            squares = (gap - np.linspace(gap.min(), gap.max(), 200_001)[:, None]) ** 2
        total += squares.mean(1).min()
    assert np.isclose(distance(a, b), np.sqrt(total), rtol=1e-8)


def test_one_unit_in_one_column_counts_as_one() -> None:
    """A column that alternates between 0 and two units has a distance of one from a constant.

    The azimuth is cyclic, so only the order of two of its distances is checked.
    """
    for i, (name, unit) in enumerate(UNITS.items()):
        path = still(8)
        path[::2, i] = 2 * unit
        if name != "azimuth_deg":
            assert np.isclose(distance(path, still(8)), 1)
    far, near = still(8), still(8)
    far[4:, 3], near[4:, 3] = 90, 30
    assert distance(far, still(8)) > distance(near, still(8)) > 0


def test_the_distance_is_a_metric_that_ignores_where_paths_begin() -> None:
    a, b = paths(6), paths(6, seed=1)
    far = distances(a, b)
    assert far.dtype == np.float64 and far.shape == (6, 6)
    assert np.allclose(far, distances(b, a).T) and np.allclose(far[2, 3], distance(a[2], b[3]))
    assert np.allclose(distances(a + SHIFT, b), far) and np.allclose(distances(a, b - SHIFT), far)
    turns = np.array([0, 0, 0, 360.0, 0, 0])
    whole = a + turns * np.random.default_rng(2).integers(-2, 3, (6, 9, 1))
    assert np.allclose(distances(whole, b), far), "full turns change nothing visible"
    assert np.diagonal(distances(a, a + SHIFT)).max() < 1e-6
    every = distances(np.concatenate([a, b]), np.concatenate([a, b]))
    assert (every[:, :, None] <= every[:, None] + every.T[None] + 1e-9).all()


def test_the_distance_distinguishes_timing_direction_mirroring_and_size() -> None:
    a = paths(1)[0]
    mirror = np.array([-1, 1, 1, -1, 1, -1])
    for other in (a[::-1], np.roll(a, 2, 0), a * mirror, a * 0.5, np.concatenate([a[:1], a[:-1]])):
        assert distance(a, other) > 0.3


def test_a_path_sampled_at_other_frames_is_the_same_path() -> None:
    t = np.linspace(0, 1, 25)[:, None]
    line = t * np.array([0.5, -0.2, 0.8, 500.0, 10.0, 20.0])
    wrapped = line.copy()
    wrapped[:, 3] = (wrapped[:, 3] + 180) % 360 - 180
    assert np.allclose(resampled(wrapped, 10), np.linspace(0, 1, 10)[:, None] * line[-1])
    assert np.allclose(resampled(wrapped, 10)[[0, -1]], line[[0, -1]])
    assert resampled(np.stack([line] * 3), 49).shape == (3, 49, 6)


def test_the_nearest_path_is_ranked_first() -> None:
    a, b, c = paths(3)
    order = ranked(a + 0.01, {"c": c, "a": a, "b": b})
    assert order[0][0] == "a" and [d for _, d in order] == sorted(d for _, d in order)


def test_arrays_that_are_not_paths_are_refused() -> None:
    a = paths(1)
    with pytest.raises(ValueError, match="9 and 5 frames"):
        distances(a, a[:, :5])
    with pytest.raises(ValueError, match="shape"):
        distances(a[..., :4], a)
    with pytest.raises(ValueError, match="shape"):
        distances(a[:, :1], a[:, :1])
    a[0, 3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        distances(a, a)
