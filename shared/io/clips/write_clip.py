"""Writes clips atomically as mp4, GIF, WebP or a folder of PNG frames, with their provenance as metadata."""

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

SHEET_COLUMNS = 8  # frames of each clip on a contact sheet
PLAYABLE_SIDE = 256  # pixels; players blur smaller clips when they enlarge them
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
    """Writes a clip at `fps` frames per second.

    The extension of `path` sets the format: `.mp4` (H.264, yuv420p, BT.709, CRF 12), `.gif` (one palette for the clip,
    looping) or `.webp` (lossless, looping). Without an extension, the clip becomes a folder of PNG frames
    `frame_0000.png`, `frame_0001.png`, … An existing file is replaced; an existing folder is replaced only if pcs wrote
    everything in it. For H.264, odd sides are made even by repeating the last row or column.

    Args:
        frames: [3, F, H, W] or [F, 3, H, W] (the former if both are possible). Values are clamped to [-1, 1]
        metadata: stored as JSON (mp4: comment; GIF: comment extension; WebP: EXIF) or as the text chunks of PNG frames;
            `read_clip_metadata` reads it back
        enlarge: the factor by which mp4, GIF and WebP clips are enlarged, without smoothing. If None, it is the
            smallest integer that makes the shorter side at least 256 pixels long. This keeps 64x64 clips sharp in
            players, and makes the halved colour resolution of yuv420p harmless. The frames of a folder are not enlarged

    Raises:
        ValueError: for any other extension or shape, for NaN or Inf, and for a rate that the format cannot store
    """
    path = expanded(path)
    frames = as_frames(frames)
    rate = _rate(fps)
    if not path.suffix:
        return _write_folder(path, frames, rate, metadata)
    if path.suffix.lower() not in _WRITERS:
        endings = ", ".join(_WRITERS)
        raise ValueError(f"{path}: use one of {endings}, or no extension for a folder of frames")
    levels = _levels(frames)
    factor = enlarge or math.ceil(PLAYABLE_SIDE / min(levels.shape[1:3]))
    levels = levels.repeat(factor, axis=1).repeat(factor, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        _WRITERS[path.suffix.lower()](temporary, levels, rate, as_json(metadata or {}))
    return path


def webp_bytes(frames: Tensor, fps: float, metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the bytes of the `.webp` file that `write_clip` would write, but without enlarging the clip."""
    stream = io.BytesIO()
    write_webp(stream, _levels(as_frames(frames)), _rate(fps), as_json(metadata or {}))
    return stream.getvalue()


def write_clip_sheet(
    path: str | os.PathLike[str],
    clips: Mapping[str, Tensor],
    columns: int = SHEET_COLUMNS,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes a contact sheet of clips ([3, F, H, W]) as PNG, with `columns` evenly spaced frames in each labelled row.

    The first and last frames are included; if a clip has fewer frames, all of them are shown.
    """
    return write_picture(contact_sheet({label: spread(clip, columns) for label, clip in clips.items()}), path, metadata)


def spread(clip: Tensor, count: int) -> Tensor:
    """Returns at most `count` evenly spaced frames [N, 3, H, W] of a clip [3, F, H, W], from the first to the last."""
    if count < 1:
        raise ValueError(f"a row of a contact sheet needs at least one frame, not {count}")
    frames = as_frames(clip).movedim(1, 0)
    return frames[torch.linspace(0, len(frames) - 1, min(count, len(frames))).round().long()]


def as_frames(frames: Tensor) -> Tensor:
    """Returns a clip ([3, F, H, W] or [F, 3, H, W]) as [3, F, H, W] on the CPU.

    Raises ValueError for any other shape, and for NaN or Inf.
    """
    if frames.ndim != 4 or 3 not in frames.shape[:2] or 0 in frames.shape:
        raise ValueError(f"a clip must have the shape [3, F, H, W]; this one has {list(frames.shape)}")
    frames = frames.detach().to("cpu", torch.float32)
    if not bool(torch.isfinite(frames).all()):
        raise ValueError("a clip contains NaN or Inf: the model failed, or its precision is too low")
    return frames if frames.shape[0] == 3 else frames.movedim(1, 0)


def _levels(frames: Tensor) -> np.ndarray:
    """Converts frames ([3, F, H, W] in [-1, 1], clamped) to 8-bit levels [F, H, W, 3]."""
    return frames.permute(1, 2, 3, 0).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).numpy()


def _rate(fps: float) -> Fraction:
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise ValueError(f"fps = {fps:g}: it must be above 0 and at most 1000 frames per second")
    return Fraction(fps).limit_denominator(1001)  # 24000/1001 is exact


def _write_folder(path: Path, frames: Tensor, rate: Fraction, metadata: Mapping[str, str] | None) -> Path:
    text = {"pcs": as_json({}), **(metadata or {}), FPS: str(rate)}  # the key "pcs" marks the folder as replaceable
    with atomic_folder(path, overwrite=True) as temporary:
        for i, frame in enumerate(frames.unbind(1)):
            write_picture(frame, temporary / f"frame_{i:04}.png", text)
    return path
