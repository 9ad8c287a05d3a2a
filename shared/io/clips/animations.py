"""Reads animated GIF, WebP and PNG files with Pillow, which completes frames that store only changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from PIL import Image

from shared.io.clips.frame_source import FrameSource, Timing
from shared.io.decode import Picture, as_picture, check_size, named_errors, opened

_SHORTEST = 20  # milliseconds; if a frame's delay is shorter than this, browsers show it for 100 ms
_INSTEAD = 100
_MILLI = Fraction(1, 1000)


class Animation(FrameSource):
    """An animated GIF, WebP or PNG. A GIF's delays below 20 ms count as 100 ms, as in every browser.

    Raises ValueError, naming the file, if the file cannot be read, is damaged, or is truncated.
    """

    may_be_transparent = True

    def __init__(self, path: Path) -> None:
        self.path = path
        ends = [Fraction(0)]
        with opened(path) as image:
            check_size(path, image.size)
            gif = image.format == "GIF"
            self.size = image.size
            self.count = getattr(image, "n_frames", 1)
            for index in range(self.count):
                image.seek(index)
                image.load()
                stated = Fraction(image.info.get("duration") or 0).limit_denominator(10**6)
                shown = _INSTEAD if stated <= 0 or (gif and stated < _SHORTEST) else stated
                ends.append(ends[-1] + shown * _MILLI)
        if gif:
            _check_trailer(path)
        self.timing = Timing(tuple(ends[:-1]), ends[-1], 10 * _MILLI if gif else _MILLI)

    def frames(self, picks: Sequence[int]) -> Iterator[Picture]:
        with opened(self.path) as image:
            profile = image.info.get("icc_profile")
            for index in picks:
                image.seek(index)
                image.load()
                yield self.same_size(self._picture(image, profile), index)

    def _picture(self, image: Image.Image, profile: bytes | None) -> Picture:
        frame = image.copy()
        frame.info = {k: v for k, v in image.info.items() if k == "transparency"} | {"icc_profile": profile}
        return as_picture(frame, self.path)


def _check_trailer(path: Path) -> None:
    """Raises ValueError if a GIF lacks its trailer, which means that it was truncated between two frames."""
    with named_errors(path), path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 256))
        if not stream.read().rstrip(b"\0").endswith(b";"):
            raise ValueError(f"{path} is truncated: the GIF has no end marker. Copy it again, or re-save it")
