"""Clips out: mp4, GIF, WebP or a folder of PNG frames, with what made them in their metadata, whole or not at all."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.config import expanded
from shared.io.clips.clip_metadata import as_json
from shared.io.clips.frame_folders import FPS
from shared.io.clips.gif_files import write_gif
from shared.io.clips.mp4_files import write_mp4
from shared.io.clips.webp_files import write_webp
from shared.io.contact_sheets import contact_sheet, write_picture
from shared.io.outputs import atomic_folder, atomic_write

PLAYABLE_SIDE = 256  # pixels: players blur what is smaller when they show it larger
_WRITERS: dict[str, Callable[[Path, np.ndarray, Fraction, str], None]] = {
    ".mp4": write_mp4,
    ".gif": write_gif,
    ".webp": write_webp,
}


def write_clip(
    path: str | os.PathLike[str],
    frames: Tensor,
    fps: float,
    metadata: Mapping[str, str] | None = None,
    enlarge: int | None = None,
) -> Path:
    """Write [3, F, H, W] (or [F, 3, H, W]; where both could be meant, the former) in [-1, 1], clamped, at `fps`.

    By the ending of `path`: `.mp4` (H.264, yuv420p, BT.709, CRF 12), `.gif` (one palette for the clip, endless),
    `.webp` (lossless, endless); without an ending a folder of PNG frames, `frame_0000.png` and on. A file that is there
    is replaced, a folder only when pcs wrote all that is in it. `metadata` is kept in the file as JSON (mp4: the
    comment; GIF: a comment extension; WebP: EXIF), in frames as text; `read_clip_metadata` reads it back.

    enlarge: every pixel of a file for players becomes a square of this many; None: as many as bring the shorter side to
    256 pixels or more, 1 where it is that large already. So clips of 64x64 stay sharp in players, and the halved colour
    resolution of yuv420p costs nothing. Frames in a folder are written as they are. For H.264 an odd side is made even
    by repeating its last row or column.

    Raises ValueError for another ending or shape, values that are not numbers, and a rate that the format cannot hold.
    """
    path = expanded(path)
    frames = as_frames(frames)
    rate = _rate(fps)
    if not path.suffix:
        return _write_folder(path, frames, rate, metadata)
    if path.suffix.lower() not in _WRITERS:
        endings = ", ".join(_WRITERS)
        raise ValueError(f"{path}: a clip is written as {endings}, or without an ending as a folder of frames")
    levels = _levels(frames)
    factor = enlarge or math.ceil(PLAYABLE_SIDE / min(levels.shape[1:3]))
    levels = levels.repeat(factor, axis=1).repeat(factor, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        _WRITERS[path.suffix.lower()](temporary, levels, rate, as_json(metadata or {}))
    return path


def webp_bytes(frames: Tensor, fps: float, metadata: Mapping[str, str] | None = None) -> bytes:
    """What `write_clip` puts into a `.webp` file, for pages that show clips in their own size."""
    stream = io.BytesIO()
    write_webp(stream, _levels(as_frames(frames)), _rate(fps), as_json(metadata or {}))
    return stream.getvalue()


def write_clip_sheet(
    path: str | os.PathLike[str],
    clips: Mapping[str, Tensor],
    columns: int = 8,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A contact sheet as PNG: a labelled row for each clip [3, F, H, W], with `columns` frames spread evenly over it.

    The first and the last frame are among them; a clip with fewer frames shows them all.
    """
    return write_picture(contact_sheet({label: spread(clip, columns) for label, clip in clips.items()}), path, metadata)


def spread(clip: Tensor, count: int) -> Tensor:
    """At most `count` frames [N, 3, H, W] of a clip [3, F, H, W], evenly spread, from the first to the last."""
    if count < 1:
        raise ValueError(f"a row of a contact sheet has at least one frame, not {count}")
    frames = as_frames(clip).movedim(1, 0)
    return frames[torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()]


def as_frames(frames: Tensor) -> Tensor:
    """[3, F, H, W] or [F, 3, H, W] as [3, F, H, W] on the CPU. ValueError for another shape or values that are no numbers."""
    if frames.ndim != 4 or 3 not in frames.shape[:2] or 0 in frames.shape:
        raise ValueError(f"a clip has the shape [3, F, H, W], and this one has {list(frames.shape)}")
    frames = frames.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(frames).all()):
        raise ValueError("a clip holds values that are not numbers (NaN or Inf): the model or its precision failed")
    return frames if frames.shape[0] == 3 else frames.movedim(1, 0)


def _levels(frames: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1], clamped, as 8 bits [F, H, W, 3]."""
    return frames.permute(1, 2, 3, 0).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).numpy()


def _rate(fps: float) -> Fraction:
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise ValueError(f"fps = {fps:g}: a clip has between 0 and 1000 frames per second")
    return Fraction(fps).limit_denominator(1001)  # 24000/1001 is exact


def _write_folder(path: Path, frames: Tensor, rate: Fraction, metadata: Mapping[str, str] | None) -> Path:
    text = {"pcs": as_json({}), **(metadata or {}), FPS: str(rate)}  # by the key "pcs" the folder may be replaced
    with atomic_folder(path, overwrite=True) as temporary:
        for i, frame in enumerate(frames.unbind(1)):
            write_picture(frame, temporary / f"frame_{i:04}.png", text)
    return path
