"""Classifies a path by its nearest neighbour among paths that are sampled from the captioned motions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from shared.toybox.motions.captioned import MOTIONS
from shared.toybox.motions.motion import Array, still
from shared.toybox.motions.path_distance import distances
from shared.toybox.motions.placing import sample_paths

STILL = "still"
_DRAWS = 64  # paths per motion, with different reach, pace and direction
_SEED = 41


@lru_cache(maxsize=8)
def _known(frames: int) -> tuple[tuple[str, ...], Array]:
    rng = np.random.default_rng(_SEED)
    drawn = {name: sample_paths(rng, motion, _DRAWS, frames) for name, motion in MOTIONS.items()}
    drawn[STILL] = still(frames)[None]
    names = tuple(name for name, paths in drawn.items() for _ in paths)
    return names, np.concatenate(list(drawn.values()))


def nearest_captioned(path: Array) -> str:
    """Returns the name of the captioned motion, or "still", whose path is nearest to `path` (`[F, 6]`).

    The distance is that of `path_distance`. A path does not include the background, so an orbit of the camera and a
    spin differ only in the angle of the turn.
    """
    names, known = _known(len(path))
    return names[int(distances(np.asarray(path, np.float64)[None], known)[0].argmin())]
