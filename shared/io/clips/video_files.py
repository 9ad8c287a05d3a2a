"""Reads video files with libav. The frame times come from the packets; only requested frames are returned."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.error import FFmpegError
from av.sidedata.sidedata import Type
from av.stream import Disposition
from PIL import Image

from shared.io.clips.clip_kinds import container, stated_size
from shared.io.clips.frame_colors import to_image
from shared.io.clips.frame_source import FrameSource, Timing
from shared.io.decode import MAX_PIXELS, Picture, as_picture, check_size
from shared.io.failures import of_the_machine, reading

_THREADS = 4  # an upper limit, because each thread keeps a frame in memory
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # libav's own decoders drop transparency


class _Packets(NamedTuple):
    """The result of a pass over the packets, with times in units of the stream's clock."""

    stamps: list[int]  # the times at which the frames are shown, ascending; empty if the file does not state them
    last: int  # the duration of the last frame
    count: int
    cut: bool  # whether the last packet is incomplete


class VideoFile(FrameSource):
    """A video file. Frames look as they do in a player (rotated, mirrored, with square pixels), in 8-bit sRGB.

    Raises ValueError, naming the file, if it is not a video, has no pictures (only sound), is damaged, or ends earlier
    than its index or header states. A truncated video is thus not mistaken for a complete one. (Streams recorded
    without an index and header sizes, such as MPEG-TS, do not state where they should end.)
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as (file, stream):
            self.may_be_transparent = _decoder(stream) is not None or _has_alpha(stream)
            self._clock: Fraction = stream.time_base
            self._aspect: Fraction = stream.sample_aspect_ratio or Fraction(1)
            check_size(path, (round(stream.codec_context.width * self._aspect), stream.codec_context.height))
            packets = _scan(file, stream)
            self._stamps = packets.stamps
            self.count = len(packets.stamps) or packets.count
            if not self.count:
                raise ValueError(f"{path} has a video stream without frames: it is empty or truncated")
            self.timing = self._timing(packets, stream.average_rate or stream.guessed_rate or Fraction(25))
            self._check_whole(packets, stream.frames)
        first = next((frame for _, frame in self._decoded(0)), None)
        if first is None:
            raise ValueError(f"{path} has a video stream in which no frame can be decoded")
        # The matrix is read only once, because in PyAV, a frame and its side data refer to each other and therefore
        # stay alive until garbage collection.
        matrices = (bytes(data) for data in first.side_data if data.type == Type.DISPLAYMATRIX)
        self._matrix = next((np.frombuffer(matrix, dtype=np.int32) for matrix in matrices), None)
        self.size = self._upright(first).size

    def frames(self, picks: Sequence[int]) -> Iterator[Picture]:
        yielded = 0
        held: tuple[int, Any] | None = None  # the frame shown before the one just decoded
        for index, frame in self._decoded(picks[0] if picks else 0):
            # if a packet has no picture, the previous picture stays on screen
            while yielded < len(picks) and picks[yielded] < index:
                yield self._picture(*(held or (index, frame)))
                yielded += 1
            if yielded < len(picks) and picks[yielded] == index:
                yield self._picture(index, frame)
                yielded += 1
            if yielded == len(picks):
                return
            held = (index, frame)
        if picks:
            raise ValueError(f"{self.path} is damaged: frame {picks[yielded]} of {self.count} cannot be decoded")

    def _picture(self, index: int, frame: Any) -> Picture:
        return self.same_size(as_picture(self._upright(frame), self.path), index)

    def _upright(self, frame: Any) -> Image.Image:
        """Returns the picture as a player shows it, with square pixels, and rotated or mirrored as stated in the
        display matrix (which phones write)."""
        image = to_image(frame)
        if self._aspect != 1:
            image = image.resize((max(1, round(image.width * self._aspect)), image.height), Image.Resampling.LANCZOS)
        return image if self._matrix is None else _turned(image, self._matrix)

    def _decoded(self, first: int) -> Iterator[tuple[int, Any]]:
        """Yields each frame with its index, in display order, starting at frame `first` or shortly before it."""
        index_of = {stamp: i for i, stamp in enumerate(self._stamps)}
        with _opened(self.path) as (file, stream):
            if first > 0 and self._stamps:
                self._seek(file, stream, self._stamps[first])
            decoder = _decoder(stream) or stream.codec_context
            # By default, libav conceals damage, and decodes frames that are too large if the header states a smaller
            # size. With these options, both are errors.
            decoder.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
            decoder.thread_type, decoder.thread_count = "AUTO", min(_THREADS, os.cpu_count() or 1)
            counted = 0
            for packet in file.demux(stream):
                for frame in decoder.decode(packet):
                    index = counted if not self._stamps else index_of.get(frame.pts, -1)
                    counted += 1
                    if index >= 0:
                        yield index, frame

    def _seek(self, file: Any, stream: Any, stamp: int) -> None:
        """Seeks to a key frame shown no later than `stamp`, or to the beginning if seeking fails."""
        with suppress(FFmpegError, OSError, StopIteration):
            file.seek(stamp, stream=stream)
            packet = next(file.demux(stream))
            if packet.is_keyframe and packet.pts is not None and packet.pts <= stamp:
                file.seek(stamp, stream=stream)
                return
        file.seek(self._stamps[0], stream=stream)

    def _timing(self, packets: _Packets, rate: Fraction) -> Timing:
        if not packets.stamps:
            return Timing.at_rate(packets.count, rate)
        begin = packets.stamps[0]
        times: list[Fraction] = [(stamp - begin) * self._clock for stamp in packets.stamps]
        usual = times[-1] - times[-2] if len(times) > 1 else 1 / rate
        return Timing(tuple(times), times[-1] + (packets.last * self._clock or usual), self._clock)

    def _check_whole(self, packets: _Packets, stated: int) -> None:
        """Raises ValueError if there are fewer frames than the index states, or fewer bytes than the header states."""
        there, size = packets.count - packets.cut, stated_size(self.path)
        if packets.cut or packets.count < stated or (size is not None and size > self.path.stat().st_size):
            raise ValueError(
                f"{self.path} is truncated: it has {there}{f' of {stated}' if stated else ''} frames. Copy it again, or "
                "save the intact part as a new file: ffmpeg -i FILE -c copy NEW"
            )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Opens a video and yields (container, video stream); libav's errors become a ValueError that names the file."""
    with reading(path):
        kind = container(path)
    try:
        with path.open("rb") as data, av.open(data, format=kind) as file:
            streams = [s for s in file.streams.video if not s.disposition & Disposition.attached_pic]  # cover art
            if not len(file.streams):
                raise ValueError(
                    f"{path} cannot be read as a video; it is damaged or truncated: it contains no streams"
                )
            if not streams:
                holds = sorted({"cover art" if s.type == "video" else s.type for s in file.streams})
                raise ValueError(f"{path} has no video stream, only {', '.join(holds)}")
            if streams[0].codec_context is None:
                raise ValueError(f"{path} uses a codec that this PyAV cannot decode: save it as H.264")
            yield file, streams[0]
    except (FFmpegError, OSError) as error:
        if of_the_machine(error):
            raise
        what = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read as a video; it is damaged or truncated: {what}") from None


def why_not(path: Path) -> str:
    """Returns why a video file cannot be used, or "" if it can. Only the header is checked."""
    try:
        with _opened(path):
            return ""
    except ValueError as error:
        return str(error).removeprefix(f"{path} ")


def _scan(file: Any, stream: Any) -> _Packets:
    stamps: dict[int, int] = {}
    count, cut, unknown = 0, False, False
    for packet in file.demux(stream):
        if packet.size == 0:
            continue
        count += 1
        cut = packet.is_corrupt
        if packet.is_discard:
            continue
        unknown |= packet.pts is None
        if packet.pts is not None:
            stamps[packet.pts] = packet.duration or 0
    ordered = [] if unknown else sorted(stamps)
    return _Packets(ordered, stamps[ordered[-1]] if ordered else 0, count, cut)


def _decoder(stream: Any) -> Any:
    """Returns a decoder that keeps transparency if the stream's own decoder would drop it, and None otherwise."""
    name = _ALPHA_DECODERS.get(stream.codec_context.name)
    if name is None or stream.metadata.get("alpha_mode") != "1":
        return None
    return av.CodecContext.create(name, "r")


def _has_alpha(stream: Any) -> bool:
    pixel_format = stream.codec_context.format
    return pixel_format is None or any(component.is_alpha for component in pixel_format.components)


def _turned(image: Image.Image, matrix: np.ndarray) -> Image.Image:
    """Applies a display matrix, x' = a x + c y, y' = b x + d y, if it is one of the eight rotations and reflections.
    Otherwise, returns the image unchanged."""
    a, b, _, c, d = matrix[:5].tolist()
    turn = _TURNS.get(tuple((v > 0) - (v < 0) if abs(v) > _HALF else 0 for v in (a, b, c, d)))
    return image if turn is None else image.transpose(turn)


_HALF = 1 << 15  # 0.5 in 16.16 fixed point
_TURNS: dict[tuple[int, ...], Image.Transpose] = {
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
