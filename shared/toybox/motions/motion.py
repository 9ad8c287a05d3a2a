"""Defines motions as pure functions of time, with a few parameters that are drawn for each clip.

A *path* is a float64 array `[..., F, 6]` with columns `PATH`. It describes the pose of a thing in each of F frames.
A clip's time runs from 0 (first frame) to 1 (last frame), whatever the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

PATH = ("x", "y", "log_scale", "azimuth_deg", "elevation_deg", "roll_deg")
"""The columns of a path. They are the fields of `world.Camera`, except that the scale is replaced by its natural
logarithm. x points right and y points down, in fractions of the picture."""
CHANNELS = (*PATH, "pan")
"""The channels that a motion can change. They are the columns of the path and, for camera motions, the shift of the
background to the right, in fractions of the picture."""

Parameters: TypeAlias = Mapping[str, Array]
Shape: TypeAlias = Callable[[Array, Parameters], Mapping[str, Array]]


@dataclass(frozen=True)
class Motion:
    """A motion. Its channels are relative to the pose in which `placing.place` puts the thing.

    shape: maps t [F] in [0, 1] and parameters [N, 1] to channels [N, F], or [F] if they are the same for all N.
        Channels that it omits stay at 0.
    limits: the range from which each parameter is drawn uniformly
    either_way: the parameters that are randomly +1 or -1
    facing_deg: the azimuth to which the azimuth channel is added, for a thing that must face along its path. If None,
        this azimuth is random.
    """

    name: str
    shape: Shape = field(repr=False)
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    either_way: tuple[str, ...] = ()
    facing_deg: float | None = None

    def draw(self, rng: np.random.Generator, n: int = 1) -> dict[str, Array]:
        """Draws n values of each parameter, [n, 1]."""
        drawn = {name: rng.uniform(low, high, (n, 1)) for name, (low, high) in self.limits.items()}
        return drawn | {name: rng.choice((-1.0, 1.0), (n, 1)) for name in self.either_way}

    def median(self) -> dict[str, Array]:
        """Returns the midpoint of each parameter's limits, and +1 for the parameters in `either_way`. Each is
        [1, 1]."""
        middle = {name: np.full((1, 1), (low + high) / 2) for name, (low, high) in self.limits.items()}
        return middle | {name: np.ones((1, 1)) for name in self.either_way}

    def offsets(self, parameters: Parameters, frames: int) -> Array:
        """Returns the channels over time, [N, F, 7]. Raises ValueError if there are fewer than two frames."""
        if frames < 2:
            raise ValueError(f"a motion needs at least 2 frames, not {frames}")
        n = max((len(values) for values in parameters.values()), default=1)
        moved = self.shape(np.linspace(0, 1, frames), parameters)
        out = np.zeros((n, frames, len(CHANNELS)))
        for name, values in moved.items():
            out[..., CHANNELS.index(name)] = values
        return out

    def path(self, frames: int = 16) -> Array:
        """Returns the path [F, 6] for the median parameters, relative to a pose of zeros. This path represents the
        motion in comparisons."""
        return self.offsets(self.median(), frames)[0, :, : len(PATH)]


def still(frames: int = 16) -> Array:
    """Returns the path [F, 6] of a thing that does not move."""
    return np.zeros((frames, len(PATH)))


def ramp(t: Array, start: float, end: float) -> Array:
    """Returns a ramp over the times t. It is 0 before `start`, rises smoothly, and is 1 after `end`."""
    u = np.clip((t - start) / (end - start), 0, 1)
    return u * u * (3 - 2 * u)


def hop(u: Array) -> Array:
    """Returns the height of a thrown thing at time u in [0, 1]. It is 0 at both ends and 1 in the middle."""
    return 4 * u * (1 - u)


def views(paths: Array) -> Array:
    """Returns unit vectors [..., F, 3] from a thing to its camera (x forward, y left, z up), for paths
    `[..., F, 6]`."""
    azimuth, elevation = (np.radians(paths[..., PATH.index(name)]) for name in ("azimuth_deg", "elevation_deg"))
    level = np.cos(elevation)
    return np.stack([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)], -1)
