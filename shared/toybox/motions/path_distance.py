"""Measures how far apart two motions are by comparing their paths over time.

Two paths a and b are `[F, 6]` with columns `motion.PATH`. The distance between them is the root mean square of
their difference over the F frames. Each column is measured in units of a clearly visible change (`UNITS`), and one of
the paths is shifted so that the distance is as small as possible:

    d² = min over shifts s of 1/F Σ_t ( Σ_linear ((a_t - b_t - s) / unit)² + |exp(i a_t) - exp(i (b_t + s))|² / chord² )

The azimuth, which wraps around, is compared on the unit circle, where one unit is a chord of 2 sin(unit / 2). The other
columns are linear. Both minima have closed forms. For a linear column, the best shift is the difference between the
means. For the azimuth, the smallest mean of |…|² is 2 - 2 |mean exp(i (a - b))|.

- The distance ignores the pose in which a motion begins. A thing's initial position, size, view and tilt belong to the
  picture, so the same motion further to the left has distance 0. The shift is fitted to all frames. If it were taken
  from the first frame, an error in that frame would affect all others.
- The distance does not ignore timing (rhythm, direction and phase), mirroring or size. A zigzag half as large is a
  different motion.
- The distance is a metric on paths up to shifts of each column. It is symmetric, is zero only if such shifts make the
  paths equal, and satisfies the triangle inequality.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shared.toybox.motions.motion import PATH, Array

UNITS: dict[str, float] = {
    "x": 0.1,
    "y": 0.1,
    "log_scale": 0.25,
    "azimuth_deg": 45.0,
    "elevation_deg": 30.0,
    "roll_deg": 15.0,
}
"""The unit of each column. It is a tenth of the picture for the position, growth by about 28% for the scale, half the
angle between neighbouring views for the azimuth, 30 degrees for the elevation, and 15 degrees for the roll."""

_TURN = PATH.index("azimuth_deg")
_LINES = [i for i in range(len(PATH)) if i != _TURN]
_SCALES = np.array([UNITS[PATH[i]] for i in _LINES])
_CHORD = 2 * np.sin(np.radians(UNITS["azimuth_deg"]) / 2)


def distances(a: Array, b: Array) -> Array:
    """Returns the distances `[N, M]` between paths a `[N, F, 6]` and paths b `[M, F, 6]`.

    Raises:
        ValueError: if the shapes are wrong, the frame counts differ (see `resampled`), or values are not finite
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"cannot compare paths of {a.shape[1]} and {b.shape[1]} frames: resample one of them first")
    frames = a.shape[1]
    first, second = _lines(a), _lines(b)
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    turned = np.abs(_circle(a) @ _circle(b).conj().T) / frames
    return np.sqrt(np.maximum(squares / frames + (2 - 2 * turned) / _CHORD**2, 0))


def distance(a: Array, b: Array) -> float:
    """Returns the distance between two paths `[F, 6]`."""
    return float(distances(np.asarray(a)[None], np.asarray(b)[None])[0, 0])


def ranked(path: Array, among: Mapping[str, Array]) -> list[tuple[str, float]]:
    """Ranks motions by the distance between their paths (`among`, `[F, 6]` by name) and `path`. The nearest motion
    comes first."""
    far = distances(np.asarray(path)[None], np.stack(list(among.values())))[0]
    return sorted(zip(among, map(float, far), strict=True), key=lambda pair: pair[1])


def resampled(path: Array, frames: int) -> Array:
    """Resamples a path `[..., F, 6]` to `frames` evenly spaced frames, keeping the first and the last.

    The azimuth is assumed to turn the shorter way from frame to frame.
    """
    path = np.asarray(path, np.float64)
    smooth = path.copy()
    smooth[..., _TURN] = np.degrees(np.unwrap(np.radians(path[..., _TURN]), axis=-1))
    at = np.linspace(0, path.shape[-2] - 1, frames)
    low = np.minimum(at.astype(int), path.shape[-2] - 2)
    part = (at - low)[:, None]
    return smooth[..., low, :] * (1 - part) + smooth[..., low + 1, :] * part


def _checked(paths: Array) -> Array:
    paths = np.asarray(paths, np.float64)
    if paths.ndim != 3 or paths.shape[2] != len(PATH) or paths.shape[1] < 2:
        raise ValueError(f"paths must have shape [N, frames, {len(PATH)}] ({', '.join(PATH)}), not {list(paths.shape)}")
    if not np.isfinite(paths).all():
        raise ValueError("a path contains NaN or Inf")
    return paths


def _lines(paths: Array) -> Array:
    """Returns the linear columns in their units, each centred over time, [N, 5 F]."""
    values = paths[..., _LINES] / _SCALES
    return (values - values.mean(1, keepdims=True)).reshape(len(paths), -1)


def _circle(paths: Array) -> np.ndarray:
    """Returns the azimuths as complex numbers on the unit circle, [N, F]."""
    return np.exp(1j * np.radians(paths[..., _TURN]))
