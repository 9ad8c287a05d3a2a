"""What every kind of clip offers a reader: when its frames are shown, and the frames that are asked for, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from shared.io.decode import Picture


@dataclass(frozen=True)
class Timing:
    """When the frames of a clip are shown, in seconds after the first."""

    times: tuple[Fraction, ...]
    end: Fraction  # when the last frame goes
    resolution: Fraction  # the step in which the file counts time

    @staticmethod
    def at_rate(count: int, fps: Fraction) -> Timing:
        """`count` frames at a constant rate."""
        return Timing(tuple(i / fps for i in range(count)), count / fps, Fraction(0))


class FrameSource:
    """A clip that is opened again for each pass. `count` frames of `size` (width, height) pixels, upright."""

    path: Path
    count: int
    size: tuple[int, int]
    timing: Timing | None  # None: nothing says how fast the frames follow each other
    may_be_transparent: bool

    def frames(self, picks: Sequence[int]) -> Iterator[Picture]:
        """The frames of these indices (ascending, none twice), decoded one after another.

        ValueError, naming the file, where it is damaged, or where a frame has another size than `size`.
        """
        raise NotImplementedError

    def same_size(self, picture: Picture, index: int) -> Picture:
        """The picture; ValueError when it does not have the size of the clip."""
        if picture.size != self.size:
            sizes = f"{picture.size[0]}x{picture.size[1]} pixels, and the first {self.size[0]}x{self.size[1]}"
            where = picture.path if picture.path not in (None, self.path) else f"frame {index} of {self.path}"
            raise ValueError(f"{where} is {sizes}: the frames of a clip must be of one size")
        return picture
