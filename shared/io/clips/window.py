"""Selects frames of a clip by rate, stride, length, start, and number of windows."""

from __future__ import annotations

import warnings
from bisect import bisect_left, bisect_right
from fractions import Fraction

from pydantic import Field

from shared.config import Frames, Many, NotNegative, Part
from shared.io.clips.frame_source import FrameSource, Timing
from shared.io.terminal import encodable

_TOLERANCE = Fraction(1, 1000)  # seconds; allows for rounded rates, such as 29.97 for 30000/1001


class ClipWindow(Part):
    """Selects windows of `length` frames from a clip, using every `stride`-th frame from `start` seconds onwards.

    If `fps` is set, the clip is sampled at equal intervals, and each sample is the frame that a player shows at that
    time. Clips with a variable frame rate thus keep their timing, and frames repeat if `fps` exceeds the clip's own
    rate. Without `fps`, the clip's frames are used as they are. A folder of frames without a rate is used frame by
    frame, as if it had been sampled at `fps`.

    The windows are spread evenly over the clip and may overlap. If the clip has fewer than `windows` distinct windows,
    all of these are used, and a UserWarning is issued.
    """

    fps: float | None = Field(default=None, gt=0, le=1000)
    stride: Many = 1
    length: Frames = 16  # frames
    start: NotNegative = 0.0  # seconds
    windows: Many = 1

    def picks(self, source: FrameSource) -> list[tuple[int, ...]]:
        """Returns the ascending frame indices of each window. An index repeats if its frame is shown for several
        samples.

        Raises ValueError, naming the clip and its number of frames, if the clip is shorter than one window.
        """
        samples = self._samples(source)
        room = len(samples) - ((self.length - 1) * self.stride + 1)
        if room < 0:
            raise ValueError(self._too_short(source, len(samples)))
        count = min(self.windows, room + 1)
        if count < self.windows:
            note = (
                f"{source.path} has only {count} distinct windows of {self.length} frames, but windows={self.windows}"
            )
            warnings.warn(encodable(f"{note}: all of them are used"), UserWarning, stacklevel=2)
        starts = [round(i * room / (count - 1)) if count > 1 else 0 for i in range(count)]
        return [tuple(samples[s : s + (self.length - 1) * self.stride + 1 : self.stride]) for s in starts]

    def rate(self, source: FrameSource, picks: tuple[int, ...]) -> float | None:
        """Returns a window's frame rate (the mean rate, if it varies) in frames per second, or None if it is
        unknown."""
        if self.fps is not None:
            return self.fps / self.stride
        if source.timing is None:
            return None
        timing = source.timing
        span = timing.times[picks[-1]] - timing.times[picks[0]]
        whole = Fraction(source.count) / timing.end / self.stride if timing.end else None
        rate = (len(picks) - 1) / span if len(picks) > 1 and span else whole
        return None if rate is None else float(rate)

    def _samples(self, source: FrameSource) -> list[int]:
        """Returns the frame index of each sample from `start` to the end of the clip, before `stride` is applied."""
        fps, timing = self._exact_fps(), source.timing
        if timing is None:
            if fps is None and self.start > 0:
                raise ValueError(
                    f"{source.path} is a folder of frames without a rate, but start = {self.start:g} is in seconds: "
                    "set fps as well, or leave start out"
                )
            return list(range(round(Fraction(self.start) * (fps or 1)), source.count))
        if fps is None:
            slack = max(timing.resolution, _TOLERANCE)
            return list(range(bisect_left(timing.times, Fraction(self.start) - slack), source.count))
        return sample(timing, fps, Fraction(str(self.start)))

    def _exact_fps(self) -> Fraction | None:
        return None if self.fps is None else Fraction(str(self.fps))

    def _too_short(self, source: FrameSource, samples: int) -> str:
        have = -(-samples // self.stride)
        frames = "1 frame" if have == 1 else f"{have} frames"
        at = [f"at {self.fps:g} frames per second"] if self.fps is not None and source.timing is not None else []
        at += [f"with stride {self.stride}"] if self.stride > 1 else []
        at += [f"from {self.start:g} s onwards"] if self.start > 0 else []
        change = [f"length={have} or less"] if have else []
        change += ["a smaller stride"] if self.stride > 1 else []
        change += ["a higher fps"] if self.fps is not None and source.timing is not None else []
        change += ["an earlier start"] if self.start > 0 else []
        return (
            f"{source.path} has {' '.join([frames, *at])}, but length={self.length}: "
            f"choose {' or '.join(change) or 'a longer clip'}, or leave this clip out"
        )


def sample(timing: Timing, fps: Fraction, start: Fraction) -> list[int]:
    """Returns the index of the frame shown at start + k / fps seconds, for every k before the end of the clip.

    A tolerance makes up for the rounding of times to the file's clock.
    """
    slack = min(max(timing.resolution, _TOLERANCE), 1 / (4 * fps))
    count = max(0, -((start + slack - timing.end) * fps // 1))
    return [max(0, bisect_right(timing.times, start + k / fps + slack) - 1) for k in range(count)]
