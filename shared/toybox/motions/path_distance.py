"""Measures how far apart two motions are, by their paths over time.

The distance of paths a and b, `[F, 6]` with the columns `motion.PATH`, is the root mean square over the F frames of their
difference in units of a clearly visible change (`UNITS`), after the shift of each column that brings them closest:

    d² = min over shifts s of 1/F Σ_t ( Σ_linear ((a_t - b_t - s) / unit)² + |exp(i a_t) - exp(i (b_t + s))|² / chord² )

with the azimuth on the circle because it wraps around (chord = 2 sin(unit / 2)), and the other columns on the line. Both
minima have closed forms: on the line the shift is the difference of means, and on the circle the mean is
2 - 2 |mean exp(i (a - b))|.

- **Ignored**: where a motion begins. The place, size, view and tilt of a thing belong to the picture: a motion on the
  left is the same as on the right. The best shift is used rather than that of the first frame, so that an error in one frame
  does not affect all.
- **Not ignored**: time (rhythm, direction, phase), mirroring, and size: half a zigzag is a different motion.
- It is a metric on paths up to such shifts: symmetric, zero only between shifted paths, and with the triangle inequality.
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
"""The unit of each column: a tenth of the picture, a growth of about a quarter, half-way to the next view."""

_TURN = PATH.index("azimuth_deg")
_LINES = [i for i in range(len(PATH)) if i != _TURN]
_SCALES = np.array([UNITS[PATH[i]] for i in _LINES])
_CHORD = 2 * np.sin(np.radians(UNITS["azimuth_deg"]) / 2)


def distances(a: Array, b: Array) -> Array:
    """Distances `[N, M]` of paths a `[N, F, 6]` from paths b `[M, F, 6]`.

    Raises:
        ValueError: wrong shapes, different numbers of frames (see `resampled`), or values that are not finite
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
    """Ranks the motions `among` (name -> path `[F, 6]`) by their distance from a path, nearest first."""
    far = distances(np.asarray(path)[None], np.stack(list(among.values())))[0]
    return sorted(zip(among, map(float, far), strict=True), key=lambda pair: pair[1])


def resampled(path: Array, frames: int) -> Array:
    """Resamples a path `[..., F, 6]` to another number of evenly spaced frames, keeping the first and the last one.

    Azimuths are assumed to turn the shorter way from frame to frame.
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
    """[N, 5 F]: the columns on the line, centred over time and in their units."""
    values = paths[..., _LINES] / _SCALES
    return (values - values.mean(1, keepdims=True)).reshape(len(paths), -1)


def _circle(paths: Array) -> np.ndarray:
    """[N, F]: the azimuths as complex numbers on the unit circle."""
    return np.exp(1j * np.radians(paths[..., _TURN]))
