"""Recognizes the toybox's motions by the thing's path, which is its position, size, view and tilt over time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from shared.io.clips.clip_metadata import read_clip_metadata
from shared.toybox.motions.clips import draw_clip, sample_moving
from shared.toybox.motions.held_out import motion_names
from shared.toybox.motions.look_alikes import candidates
from shared.toybox.motions.motion import PATH, Array, Motion
from shared.toybox.motions.path_distance import ranked, resampled
from shared.toybox.motions.reference_clips import KEY

#: The number of true clips from which the share of a motion that can be recognized is measured.
TRUE_CLIPS = 16
_TRUE = 17  # part of the seeds of true clips; no reference clip uses it
#: Ceilings that this process has already measured. A benchmark judges many concepts against the same few motions.
_CEILINGS: dict[Hashable, float] = {}


class PathReader(Protocol):
    """Reads the path of the thing from a clip."""

    def __call__(self, frames: Tensor) -> Array:
        """Returns the path in a clip `[3, F, H, W]` in [-1, 1], as float64 `[F, 6]` with the columns of `motion.PATH`."""
        ...


@dataclass(frozen=True)
class Recognition:
    """The motion that a path was recognized as."""

    name: str  # the nearest candidate
    distance: float  # distance to that candidate; see `path_distance`
    margin: float  # how much farther away the second-nearest candidate is


def recognized(path: Array, among: Mapping[str, Array]) -> Recognition:
    """Finds the motion in `among` (name -> path `[f, 6]`) that is nearest to `path` (`[F, 6]`).

    Motions are resampled to the frame count of `path`. Timing matters, because a different rhythm is a different
    motion. Raises ValueError if there are no motions.
    """
    if not among:
        raise ValueError("recognition needs motions to choose from, but there are none")
    order = ranked(path, {name: resampled(known, len(path)) for name, known in among.items()})
    margin = order[1][1] - order[0][1] if len(order) > 1 else float("inf")
    return Recognition(order[0][0], order[0][1], margin)


@dataclass(frozen=True)
class PathError:
    """Root mean square differences over time. Each column is first shifted to fit best, because the starting point is
    not part of a motion."""

    position_px: float  # of the thing's centre
    scale: float  # of the natural logarithm of its size: 0.1 is about 10%
    azimuth_deg: float
    elevation_deg: float
    roll_deg: float


def path_error(path: Array, truth: Array, side: int) -> PathError:
    """Returns how far `path` (`[F, 6]`) is from `truth` (`[f, 6]`, resampled to F frames), in frames with a side
    length of `side` pixels."""
    gap = np.asarray(path, np.float64) - resampled(truth, len(path))
    turn = PATH.index("azimuth_deg")
    middle = np.angle(np.exp(1j * np.radians(gap[:, turn])).mean())
    gap[:, turn] = np.degrees(np.angle(np.exp(1j * (np.radians(gap[:, turn]) - middle))))
    others = [i for i in range(len(PATH)) if i != turn]
    gap[:, others] -= gap[:, others].mean(0)
    rms = dict(zip(PATH, np.sqrt((gap**2).mean(0)), strict=True))
    place = side * float(np.hypot(rms["x"], rms["y"]))
    angles = {name: float(rms[name]) for name in ("azimuth_deg", "elevation_deg", "roll_deg")}
    return PathError(place, float(rms["log_scale"]), **angles)


@dataclass(frozen=True)
class KnownMotion:
    """A held-out motion of the toybox, and the motions it must be told apart from."""

    name: str  # "development-zigzag"
    motion: Motion

    @property
    def split(self) -> str:
        return self.name.split("-")[0]

    def candidates(self, frames: int) -> dict[str, Array]:
        """Returns the paths `[F, 6]` of the motion, its look-alikes, the split's other motions and standing still, by
        name."""
        return candidates(self.motion, self.split, frames)

    @property
    def chance(self) -> float:
        return 1 / len(self.candidates(2))

    def is_shown(self, path: Array) -> tuple[bool, Recognition]:
        """Returns whether this motion is the one nearest to a path `[F, 6]`, and what the path was recognized as."""
        found = recognized(path, self.candidates(len(path)))
        return found.name == self.motion.name, found


def known_motion(files: Sequence[Path]) -> KnownMotion | None:
    """Finds the held-out motion named in the clips' metadata. Returns None for other clips and for clips of several motions."""
    names = set()
    for file in files:
        try:
            names.add(read_clip_metadata(file).get(KEY, ""))
        except ValueError:
            return None
    name = names.pop() if len(names) == 1 else ""
    motions = motion_names()
    return KnownMotion(name, motions[name]) if name in motions else None


def recognition_ceiling(
    reader: PathReader,
    known: KnownMotion,
    frames: int,
    clips: int | None = None,
    through: Callable[[Tensor], Tensor] | None = None,
    through_key: str = "",
) -> float:
    """Returns the share of newly drawn true clips of the motion that are recognized. No model can be expected to do
    better.

    clips: the number of clips; if None, `TRUE_CLIPS`
    through: the model's autoencoder, which takes and returns `[F, 3, H, W]`; generated frames have passed through it
        too
    through_key: the autoencoder's fingerprint. If it is given, the result is kept, and later calls with the same reader,
        motion, frame count, clip count and fingerprint return it
    """
    clips = TRUE_CLIPS if clips is None else clips
    key = (reader, known.name, frames, clips, through_key)
    if through_key and key in _CEILINGS:
        return _CEILINGS[key]
    rng = np.random.default_rng([_TRUE, *known.name.encode()])
    hits = 0
    for _ in range(clips):
        drawn = draw_clip(sample_moving(rng, known.motion, frames)).frames.permute(0, 3, 1, 2) * 2 - 1
        shown = drawn if through is None else through(drawn)
        hits += known.is_shown(reader(shown.transpose(0, 1)))[0]
    if through_key:
        _CEILINGS[key] = hits / clips
    return hits / clips
