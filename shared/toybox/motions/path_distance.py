"""How far apart two motions are, by their paths over time.

The distance of paths a and b, `[F, 6]` with the columns `motion.PATH`, is the root mean square over the F frames of their
difference in units of what is plainly seen (`UNITS`), after the shift of each column that brings them nearest:

    d² = min over shifts s of 1/F Σ_t ( Σ_linear ((a_t - b_t - s) / unit)² + |exp(i a_t) - exp(i (b_t + s))|² / chord² )

with the azimuth on the circle, for it may go round (chord = 2 sin(unit / 2)), and the other columns on the line. Both minima
have closed forms: the shift of a line is the difference of means, and on the circle the sum is 2 - 2 |mean exp(i (a - b))|.

- **The same to it**: where a motion begins: the place, size, view and tilt of a thing are its picture's affair, and a motion
  shown on the left is the motion shown on the right. The shift is the best one rather than that of the first frame, so that
  an error in one frame is no error in all.
- **Not the same**: time (other rhythm, other direction, other phase), a mirror, and size: half a zigzag is another motion.
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
"""What counts as one, column by column: a tenth of the picture, a quarter larger, half of the way to the next view."""

_TURN = PATH.index("azimuth_deg")
_LINES = [i for i in range(len(PATH)) if i != _TURN]
_SCALES = np.array([UNITS[PATH[i]] for i in _LINES])
_CHORD = 2 * np.sin(np.radians(UNITS["azimuth_deg"]) / 2)


def distances(a: Array, b: Array) -> Array:
    """Distances `[N, M]` of paths a `[N, F, 6]` from paths b `[M, F, 6]`.

    Raises:
        ValueError: they are no paths, differ in their number of frames (see `resampled`), or hold what is no number
    """
    a, b = _checked(a), _checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"paths of {a.shape[1]} and {b.shape[1]} frames cannot be compared: bring them to one number")
    frames = a.shape[1]
    first, second = _lines(a), _lines(b)
    squares = (first**2).sum(1)[:, None] + (second**2).sum(1)[None] - 2 * first @ second.T
    turned = np.abs(_circle(a) @ _circle(b).conj().T) / frames
    return np.sqrt(np.maximum(squares / frames + (2 - 2 * turned) / _CHORD**2, 0))


def distance(a: Array, b: Array) -> float:
    """The distance of two paths `[F, 6]`."""
    return float(distances(np.asarray(a)[None], np.asarray(b)[None])[0, 0])


def ranked(path: Array, among: Mapping[str, Array]) -> list[tuple[str, float]]:
    """The motions `among` (name -> path `[F, 6]`) with their distances from a path, nearest first."""
    far = distances(np.asarray(path)[None], np.stack(list(among.values())))[0]
    return sorted(zip(among, map(float, far), strict=True), key=lambda pair: pair[1])


def resampled(path: Array, frames: int) -> Array:
    """A path `[..., F, 6]` at another number of evenly spaced frames, between the same first and last one.

    Azimuths are read as turning the shorter way from frame to frame.
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
        raise ValueError(f"paths have the shape [N, frames, {len(PATH)}] ({', '.join(PATH)}), not {list(paths.shape)}")
    if not np.isfinite(paths).all():
        raise ValueError("a path holds values that are not numbers (NaN or Inf)")
    return paths


def _lines(paths: Array) -> Array:
    """[N, 5 F]: the columns on the line, centred over time and in their units."""
    values = paths[..., _LINES] / _SCALES
    return (values - values.mean(1, keepdims=True)).reshape(len(paths), -1)


def _circle(paths: Array) -> np.ndarray:
    """[N, F]: the azimuths as complex numbers on the unit circle."""
    return np.exp(1j * np.radians(paths[..., _TURN]))
