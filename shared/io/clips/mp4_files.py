"""Writes H.264 video as mp4 files that every browser and player can play."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import Colorspace

_BT709, _LIMITED = 1, 1  # ITU-T H.273
_CRF = "12"  # visually lossless; clips of the size written here stay below 1 MB


def write_mp4(path: Path, levels: np.ndarray, fps: Fraction, comment: str) -> None:
    """Writes frames ([F, H, W, 3], 8-bit sRGB) as H.264, with the index first so that the clip can play while it loads.

    Odd sides are padded to even lengths. Raises OSError if the file cannot be written.
    """
    odd = ((0, 0), (0, levels.shape[1] % 2), (0, levels.shape[2] % 2), (0, 0))
    levels = np.ascontiguousarray(np.pad(levels, odd, mode="edge"))
    try:
        with path.open("wb") as data:
            _encode(data, levels, fps, comment)
    except FFmpegError as error:
        raise OSError(getattr(error, "errno", None) or 0, f"{path.name} cannot be written: {error}") from None


def _encode(data: Any, levels: np.ndarray, fps: Fraction, comment: str) -> None:
    with av.open(data, "w", format="mp4", options={"movflags": "+faststart"}) as file:
        file.metadata["comment"] = comment
        stream: Any = file.add_stream("libx264", rate=fps, options={"crf": _CRF, "preset": "medium"})
        stream.height, stream.width = levels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        coder = stream.codec_context
        coder.colorspace = coder.color_primaries = coder.color_trc = _BT709
        coder.color_range = _LIMITED
        for i, level in enumerate(levels):
            rgb: Any = av.VideoFrame.from_ndarray(level, format="rgb24")
            frame = rgb.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts = i
            frame.time_base = 1 / fps
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
