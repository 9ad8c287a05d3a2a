"""Opens any kind of clip: a video, an animation, or a folder of frames."""

from __future__ import annotations

import os
from pathlib import Path

from shared.config import absent, expanded
from shared.io.clips.animations import Animation
from shared.io.clips.clip_kinds import READABLE, clip_kind
from shared.io.clips.frame_folders import FrameFolder
from shared.io.clips.frame_source import FrameSource
from shared.io.clips.video_files import VideoFile
from shared.io.failures import reading


def open_frames(path: str | os.PathLike[str]) -> FrameSource:
    """Opens a clip, determining its kind from its contents. Raises ValueError, naming the path, if it is missing, not a
    clip, or unreadable."""
    path = expanded(path)
    if path.is_dir():
        return FrameFolder(path)
    kind = _kind(path)
    if kind == "video":
        return VideoFile(path)
    if kind == "animation" or kind == "picture":
        return _picture_file(path, kind)
    raise ValueError(f"{path} is not a clip; supported kinds: {READABLE}")


def _kind(path: Path) -> str | None:
    with reading(path):
        if not path.exists():
            raise ValueError(f"{path} {absent(path)}")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty (0 bytes)")
        return clip_kind(path)


def _picture_file(path: Path, kind: str) -> FrameSource:
    if kind == "picture" and path.suffix.lower() not in (".gif", ".webp", ".apng"):
        raise ValueError(f"{path} is one picture, not a clip: put the frames of a clip in their own folder")
    return Animation(path)
