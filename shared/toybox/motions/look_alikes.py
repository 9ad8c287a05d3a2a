"""Defines the look-alikes of a motion, which must not be mistaken for it. A look-alike is the same motion, but
mirrored or with a different rhythm or direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from shared.toybox.motions.held_out import held_out_motions
from shared.toybox.motions.motion import Array, Motion, Parameters, Shape, still
from shared.toybox.motions.path_distance import UNITS, distance

GAP = 0.6
"""Look-alikes must be farther than this (see `path_distance`) from their motion and from each other."""
MOST = 6
_FINE = 257  # number of points in time at which a path is sampled


def _timed(warp: Callable[[Array], Array]) -> Callable[[Shape], Shape]:
    def change(shape: Shape) -> Shape:
        return lambda t, p: shape(warp(t), p)

    return change


def _signed(*channels: str) -> Callable[[Shape], Shape]:
    def change(shape: Shape) -> Shape:
        def turned(t: Array, p: Parameters) -> Mapping[str, Array]:
            return {name: -v if name in channels else v for name, v in shape(t, p).items()}

        return turned

    return change


def _swapped(shape: Shape) -> Shape:
    def across(t: Array, p: Parameters) -> Mapping[str, Array]:
        other = {"x": "y", "y": "x"}
        return {other.get(name, name): v for name, v in shape(t, p).items()}

    return across


def _steady(shape: Shape) -> Shape:
    """Returns a shape that follows the same path at constant speed."""

    def even(t: Array, p: Parameters) -> Mapping[str, Array]:
        fine = np.linspace(0, 1, _FINE)
        n = max(len(values) for values in p.values())
        moved = {name: np.broadcast_to(values, (n, _FINE)) for name, values in shape(fine, p).items()}
        steps = sum((np.diff(v, axis=-1) / UNITS[name]) ** 2 for name, v in moved.items() if name in UNITS)
        gone = np.cumsum(np.sqrt(steps) + 1e-9, axis=-1)  # 1e-9 keeps the sum strictly increasing even at rest
        gone = np.concatenate([np.zeros((n, 1)), gone / gone[:, -1:]], axis=-1)
        when = np.stack([np.interp(t, row, fine) for row in gone])
        return {
            name: np.stack([np.interp(at, fine, row) for at, row in zip(when, values, strict=True)])
            for name, values in moved.items()
        }

    return even


CHANGES: dict[str, Callable[[Shape], Shape]] = {
    "reversed": _timed(lambda t: 1 - t),
    "mirrored": _signed("x", "azimuth_deg", "roll_deg"),
    "steady": _steady,
    "late": _timed(lambda t: t**2.2),
    "early": _timed(lambda t: 1 - (1 - t) ** 2.2),
    "there and back": _timed(lambda t: 1 - np.abs(2 * t - 1)),
    "upside down": _signed("y", "log_scale"),
    "swapped": _swapped,
    "once and a half": _timed(lambda t: np.where(t < 2 / 3, 1.5 * t, 2 - 1.5 * t)),
    "half of it": _timed(lambda t: t / 2),
}
"""The changes that turn a motion into its look-alikes, beginning with those that are hardest to detect in a single
frame."""


def look_alikes(motion: Motion) -> tuple[Motion, ...]:
    """Returns up to `MOST` look-alikes of a motion. The `CHANGES` are applied in order, and a result is kept if it is
    far enough from the motion and from the results already kept."""
    chosen: list[Motion] = []
    for name, change in CHANGES.items():
        other = Motion(
            f"{motion.name}, {name}", change(motion.shape), motion.limits, motion.either_way, motion.facing_deg
        )
        if all(distance(other.path(), known.path()) > GAP for known in (motion, *chosen)):
            chosen.append(other)
    return tuple(chosen[:MOST])


def candidates(motion: Motion, split: str, frames: int = 16) -> dict[str, Array]:
    """Returns the paths, `[F, 6]` by name, with which a clip's path is compared in order to recognize a motion.

    They are the paths of the motion itself, of its look-alikes and of the other held-out motions in its split. The path
    of a thing that stands still is added, so that frozen clips are recognized as such.
    """
    others = [other for other in held_out_motions(split) if other.name != motion.name]
    paths = {m.name: m.path(frames) for m in (motion, *look_alikes(motion), *others)}
    return paths | {"still": still(frames)}
