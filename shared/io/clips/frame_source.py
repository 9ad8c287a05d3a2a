"""Defines the interface shared by all kinds of clips: the times of the frames, and access to requested frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from shared.io.decode import Picture


@dataclass(frozen=True)
class Timing:
    """The times at which the frames of a clip are shown, in seconds after the start of the first frame."""

    times: tuple[Fraction, ...]
    end: Fraction  # when the last frame ends
    resolution: Fraction  # the length of one tick of the file's clock

    @staticmethod
    def at_rate(count: int, fps: Fraction) -> Timing:
        """Returns the timing of `count` frames at a constant rate."""
        return Timing(tuple(i / fps for i in range(count)), count / fps, Fraction(0))


class FrameSource:
    """A clip of `count` upright frames of `size` (width, height) pixels. The file is reopened for each pass."""

    path: Path
    count: int
    size: tuple[int, int]
    timing: Timing | None  # None if the frame rate is unknown
    may_be_transparent: bool

    def frames(self, picks: Sequence[int]) -> Iterator[Picture]:
        """Yields the frames at the indices `picks` (strictly ascending), decoded one after another.

        Raises ValueError, naming the file, if the file is damaged or a frame's size is not `size`.
        """
        raise NotImplementedError

    def same_size(self, picture: Picture, index: int) -> Picture:
        """Returns the picture. Raises ValueError if its size differs from the clip's."""
        if picture.size != self.size:
            sizes = f"{picture.size[0]}x{picture.size[1]} pixels, but the first frame is {self.size[0]}x{self.size[1]}"
            where = picture.path if picture.path not in (None, self.path) else f"frame {index} of {self.path}"
            raise ValueError(f"{where} is {sizes}: all frames of a clip must have the same size")
        return picture
