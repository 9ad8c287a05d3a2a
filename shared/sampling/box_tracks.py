"""Boxes for objects in a picture or clip. An object has one box, or boxes at some frames. Between these frames, its box
is interpolated linearly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.config import expanded
from shared.io.text_files import read_text_file

Box = tuple[float, float, float, float]  # left, top, right, bottom, as fractions of the width and height
Track = Mapping[int, Box]  # boxes by frame


def as_track(value: Any, name: str) -> dict[int, Box]:
    """Parses one box for all frames, a list with one box for each of the first frames, or a mapping from frames
    to boxes. Raises ValueError if a box or a frame is invalid."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], int | float):
        value = {0: value}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"{name}: give a box [left, top, right, bottom], a list of boxes, or boxes by frame")
    return {_frame(key, name): _box(box, f"{name}, frame {key}") for key, box in value.items()}


def _frame(key: Any, name: str) -> int:
    if not str(key).isdigit():
        raise ValueError(f"{name}: {key!r} is not a frame number; frames are counted from 0")
    return int(key)


def _box(box: Any, where: str) -> Box:
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
    if not numbers or not all(math.isfinite(x) and 0 <= x <= 1 for x in box):
        raise ValueError(f"{where}: {box!r} is not a box [left, top, right, bottom] in fractions between 0 and 1")
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(
            f"{where}: the box {list(box)} is empty; left must be less than right, and top must be less than bottom "
            "(0 is at the top)"
        )
    return box[0], box[1], box[2], box[3]


def read_tracks(path: Path) -> dict[str, dict[int, Box]]:
    """Reads a JSON file that maps concept names or words in the prompt to boxes, in any form that `as_track` accepts.
    Raises ValueError, naming the file, if the file is invalid."""
    path = expanded(path)
    try:
        data = json.loads(read_text_file(path, "the boxes"))
    except (json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path} is not readable JSON") from None
    if not isinstance(data, dict) or not data:
        raise ValueError(
            f'{path} has no boxes: write {{"NAME": [left, top, right, bottom]}}, or boxes by frame, {{"NAME": {{"0": …}}}}'
        )
    return {str(name): as_track(value, f"{path}: {name}") for name, value in data.items()}


def check_frames(tracks: Mapping[str, Track], frames: int) -> None:
    """Raises ValueError if a box is set for a frame that is not generated."""
    for name, track in tracks.items():
        if max(track) >= frames:
            raise ValueError(
                f"the boxes of {name!r} go up to frame {max(track)} (counted from 0), but only {frames} "
                f"{'frame is' if frames == 1 else 'frames are'} generated"
            )


def at(track: Track, frame: float) -> Box:
    """Returns the box at a frame, interpolated linearly between the given boxes. Before the first given box and after
    the last, the box is constant."""
    before = max((f for f in track if f <= frame), default=min(track))
    after = min((f for f in track if f >= frame), default=max(track))
    if before >= after:
        return track[min(before, max(track))]
    share = (frame - before) / (after - before)
    a, b = track[before], track[after]
    return tuple(x + share * (y - x) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


def latent_frame_times(latents: int, factor: int) -> list[float]:
    """Returns, for each latent frame, the middle of the frames that it covers. The first latent frame covers one frame.
    Each of the others covers `factor` frames."""
    return [0.0 if i == 0 else factor * (i - 1) + (factor + 1) / 2 for i in range(latents)]


def box_masks(track: Track, times: list[float], height: int, width: int) -> Tensor:
    """Returns a bool mask [f, h, w] of the cells whose centres are in the box, with at least one cell per frame."""
    out = torch.zeros(len(times), height, width, dtype=torch.bool)
    for i, time in enumerate(times):
        left, top, right, bottom = at(track, time)
        rows, columns = _cells(top, bottom, height), _cells(left, right, width)
        out[i, rows, columns] = True
    return out


def _cells(low: float, high: float, count: int) -> slice:
    first = min(math.ceil(low * count - 0.5 - 1e-9), count - 1)
    last = math.floor(high * count - 0.5 + 1e-9)
    if last < first:  # narrower than a cell
        first = last = min(int((low + high) / 2 * count), count - 1)
    return slice(max(first, 0), last + 1)
