"""Functions that write tiny clips for the tests: videos with PyAV, animations with Pillow, and folders of frames."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

MILLI = Fraction(1, 1000)


def greys(count: int = 8, size: tuple[int, int] = (48, 32)) -> np.ndarray:
    """Returns uint8 frames `[F, H, W, 3]`. Frame i is uniformly grey at level 20 + 20 i, which identifies it.

    Args:
        count: number of frames
        size: (width, height)
    """
    levels = 20 + 20 * np.arange(count)
    return np.broadcast_to(levels[:, None, None, None], (count, size[1], size[0], 3)).astype(np.uint8)


def numbers(frames: Any) -> list[int]:
    """Returns, for each frame of a clip (`[3, F, H, W]` in [-1, 1]), the index of that frame in `greys`."""
    return [round((float(level) * 127.5 + 127.5 - 20) / 20) for level in frames.mean((0, 2, 3))]


def noisy(count: int = 8, size: tuple[int, int] = (48, 32), seed: int = 0) -> np.ndarray:
    """Returns uint8 frames `[F, H, W, 3]` of noise, which no codec compresses well."""
    return np.random.default_rng(seed).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)


def video(
    path: Path,
    frames: np.ndarray,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    fps: int | Fraction = 8,
    stamps: list[int] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes a video of `frames` (`[F, H, W, 3]` or `[F, H, W, 4]`) and returns its path.

    If `stamps` is given, frame i is shown at `stamps[i]` milliseconds instead of at i / `fps` seconds.
    """
    quick = {"crf": "4", "preset": "ultrafast"} if codec == "libx264" else {}
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}) as file:
        stream: Any = file.add_stream(codec, rate=fps, options={**quick, **(options or {})})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if stamps is not None:
            stream.codec_context.time_base = MILLI
        for i, level in enumerate(frames):
            frame: Any = av.VideoFrame.from_ndarray(level, format="rgb24" if level.shape[-1] == 3 else "rgba")
            frame.pts, frame.time_base = (i, 1 / Fraction(fps)) if stamps is None else (stamps[i], MILLI)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """Writes a file that contains 64 ms of silence and no pictures."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("aac", rate=16000, layout="mono")
        frame: Any = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def cover_art(path: Path) -> Path:
    """Writes an MP4 file whose only stream is a cover picture, as in an audiobook without its sound."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        stream.disposition = Disposition.attached_pic
        file.mux(stream.encode(av.VideoFrame.from_ndarray(greys(1)[0], format="rgb24")))
        file.mux(stream.encode())
    return path


def without_streams(path: Path) -> Path:
    """Writes a valid MP4 header that lists no streams."""

    def box(kind: bytes, data: bytes = b"") -> bytes:
        return (8 + len(data)).to_bytes(4, "big") + kind + data

    header = bytes(12) + (1000).to_bytes(4, "big") + bytes(84)  # 1000 units of time per second, and no duration
    path.write_bytes(box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", box(b"mvhd", header)) + box(b"mdat"))
    return path


def animation(path: Path, frames: np.ndarray, duration: int | list[int] = 125, **options: Any) -> Path:
    """Writes an animated GIF, WebP or PNG of `frames` (`[F, H, W, 3]` or `[F, H, W, 4]`).

    `duration` is in milliseconds. It is either one time for all frames or a list with a time for each frame.
    """
    first, *others = (Image.fromarray(frame) for frame in frames)
    usual: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    how: Any = {"save_all": True, "append_images": others, "duration": duration, "loop": 0, **usual, **options}
    first.save(path, format="PNG" if path.suffix in (".png", ".apng") else None, **how)
    return path


def folder(path: Path, frames: np.ndarray, name: str = "frame_{}.png") -> Path:
    path.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / name.format(i))
    return path


def remuxed(source: Path, path: Path, matrix: list[int]) -> Path:
    """Copies a video and sets the copy's display matrix to (a, b, c, d), as phones do."""
    a, b, c, d = (v << 16 for v in matrix)
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream: Any = new.add_stream_from_template(old.streams.video[0])
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    return path
