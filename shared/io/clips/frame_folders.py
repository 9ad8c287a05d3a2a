"""Reads a folder of numbered pictures as a clip."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

from shared.io.clips.frame_source import FrameSource, Timing
from shared.io.contact_sheets import read_metadata
from shared.io.decode import Picture, check_size, picture_size, read_frame
from shared.io.find_pictures import listing_of, sniff
from shared.io.terminal import names

CAPTION = "caption.txt"  # the file in a folder of frames that holds the clip's caption
FPS = "fps"  # the PNG text key under which pcs stores the frame rate in the frames it writes


class FrameFolder(FrameSource):
    """A folder whose pictures are the frames of a clip, in natural order (frame2 before frame10).

    The frame rate is known only if pcs wrote the frames. If it is unknown, every frame is used, whatever frame rate is
    requested.

    Raises ValueError, naming the folder or file, if there are no pictures, their sizes differ, frame numbers are
    missing or repeated, or the folder contains several series of frames. Frame numbers may have a constant step other
    than 1.
    """

    may_be_transparent = True

    def __init__(self, path: Path) -> None:
        self.path = path
        listing = listing_of(path, known=(CAPTION,))
        self.files = natural_order(listing.pictures, path)
        self.masks = listing.masks  # frame -> mask, for masks in the same folder
        self.count = len(self.files)
        self.size = picture_size(self.files[0])
        check_size(path, self.size)
        for file in self.files[1:]:
            if (size := picture_size(file)) != self.size:
                raise ValueError(
                    f"{file} is {size[0]}x{size[1]} pixels, but {self.files[0].name} is {self.size[0]}x{self.size[1]}: "
                    "all frames of a clip must have the same size"
                )
        fps = _stated_rate(self.files[0])
        self.timing = Timing.at_rate(self.count, fps) if fps else None

    def frames(self, picks: Sequence[int]) -> Iterator[Picture]:
        for index in picks:
            yield self.same_size(read_frame(self.files[index]), index)


def natural_order(files: Sequence[Path], folder: Path) -> tuple[Path, ...]:
    """Sorts frames in natural order and checks their frame numbers (the last number in each name). Raises ValueError
    if numbers are missing or repeated, or if there are several series of frames."""
    ordered = sorted(files, key=lambda p: (_natural(p.stem), p.name))
    parts = [_last_number(p.stem) for p in ordered]
    if any(part is None for part in parts):
        return tuple(ordered)
    series = {(part[0], part[2]): path for part, path in zip(parts, ordered, strict=True) if part}
    if len(series) == len(ordered) > 1:
        return tuple(ordered)  # the last number is not a frame number but, for example, a size
    if len(series) > 1:
        heads = names(p.name for p in series.values())
        raise ValueError(
            f"{folder} contains {len(series)} series of frames ({heads} …): put each clip in its own folder"
        )
    numbers = [part[1] for part in parts if part]
    steps = [b - a for a, b in pairwise(numbers)]
    for path, after, step in zip(ordered, ordered[1:], steps, strict=False):
        if step == 0:
            raise ValueError(f"{folder} contains the same frame number twice: {path.name}, {after.name}")
        if step != min(s for s in steps if s):
            raise ValueError(
                f"{folder} has a gap in its numbering: {path.name} is followed by {after.name}. Add the missing frames, or "
                "renumber the frames if none are missing"
            )
    return tuple(ordered)


def _natural(stem: str) -> list[tuple[int, int, str]]:
    """Returns a sort key in which runs of digits compare as numbers."""
    return [(0, int(run), "") if run[0] in "0123456789" else (1, 0, run) for run in re.findall(r"[0-9]+|[^0-9]+", stem)]


def _last_number(stem: str) -> tuple[str, int, str] | None:
    """Splits a name into the text before its last number, the number, and the text after it. Returns None if there is
    no number."""
    match = re.fullmatch(r"(.*?)([0-9]+)([^0-9]*)", stem, re.DOTALL)
    return (match[1], int(match[2]), match[3]) if match else None


def _stated_rate(file: Path) -> Fraction | None:
    """Returns the frame rate that pcs stored in the frame, or None if there is no valid entry."""
    if sniff(file) != "PNG":
        return None
    try:
        fps = Fraction(read_metadata(file).get(FPS, "0"))
    except (ValueError, ZeroDivisionError):
        return None
    return fps if 0 < fps <= 1000 else None
