"""Places moving things in the picture so that they stay in view throughout."""

from __future__ import annotations

import numpy as np

from shared.toybox.motions.motion import CHANNELS, PATH, Array, Motion

SMALLEST, LARGEST = 0.42, 1.02  # scales; training pictures use 0.4 to 1.1
_SIDES_DEG = (0.0, 90.0, -90.0, 180.0)


def room(scale: Array) -> Array:
    """Returns how far from the centre a thing of this scale may be. It may touch the border, but most of it stays
    inside."""
    return np.clip(0.56 - 0.4 * scale, 0.04, 0.35)


def place(rng: np.random.Generator, offsets: Array, facing_deg: float | None = None) -> Array:
    """Converts offsets `[N, F, 7]` to paths `[N, F, 6]`. Each path gets a random position, size and view that leave
    room for the motion.

    The elevation to which the offsets are added is between 0 and 35 degrees. The azimuth to which they are added is
    `facing_deg` or, if that is None, at most 40 degrees from one of the four sides.
    """
    n = len(offsets)
    x, y, grows = (offsets[..., CHANNELS.index(name)] for name in ("x", "y", "log_scale"))
    reach = np.maximum(np.ptp(x, axis=1), np.ptp(y, axis=1)) / 2
    largest = np.minimum(LARGEST, (0.56 - reach) / 0.4)
    low, high = np.log(SMALLEST) - grows.min(1), np.log(np.maximum(largest, SMALLEST)) - grows.max(1)
    size = low + np.maximum(high - low, 0) * rng.uniform(0, 1, n) ** 0.6
    free = room(np.exp(size + grows.max(1)))
    base = np.zeros((n, 1, len(PATH)))
    for column, moved in ((0, x), (1, y)):
        left, right = -free - moved.min(1), free - moved.max(1)
        at = rng.uniform(0, 1, n)
        base[:, 0, column] = np.where(right > left, left + (right - left) * at, (left + right) / 2)
    base[:, 0, 2] = size
    side = rng.choice(_SIDES_DEG, n, p=(0.4, 0.2, 0.2, 0.2))
    base[:, 0, 3] = side + rng.uniform(-40, 40, n) if facing_deg is None else facing_deg
    base[:, 0, 4] = np.clip(np.abs(rng.normal(14, 9, n)), 0, 35)
    base[:, 0, 5] = rng.normal(0, 1.5, n)
    return base + offsets[..., : len(PATH)]


def sample_paths(rng: np.random.Generator, motion: Motion, n: int, frames: int = 16) -> Array:
    """Samples n paths `[n, F, 6]` of a motion from the same distribution as those of its clips, without rendering."""
    return place(rng, motion.offsets(motion.draw(rng, n), frames), motion.facing_deg)
