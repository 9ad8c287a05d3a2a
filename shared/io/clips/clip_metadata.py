"""Stores a clip's provenance in its file, and reads it back."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import av
from av.error import FFmpegError

from shared.config import expanded
from shared.io.clips.clip_kinds import container
from shared.io.clips.frame_folders import FPS, FrameFolder
from shared.io.contact_sheets import read_metadata
from shared.io.decode import opened
from shared.io.failures import of_the_machine
from shared.io.find_pictures import sniff
from shared.io.terminal import encodable

DESCRIPTION = 0x010E  # EXIF: ImageDescription


def as_json(metadata: Mapping[str, str]) -> str:
    """Encodes metadata as one line of ASCII JSON, which is safe in the text encoding of every format."""
    return json.dumps({key: encodable(str(value)) for key, value in metadata.items()})


def read_clip_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """Reads the `metadata` that `write_clip` stored. The result is empty for a clip that was not written by pcs. Raises
    ValueError if the clip cannot be read."""
    path = expanded(path)
    if path.is_dir():
        return {k: v for k, v in read_metadata(FrameFolder(path).files[0]).items() if k != FPS}
    try:
        text = _video_comment(path) if container(path) else _picture_comment(path)
    except (OSError, FFmpegError) as error:
        if of_the_machine(error):
            raise
        raise ValueError(f"{path} cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    try:
        content = json.loads(text)
    except ValueError:
        return {}  # a comment written by another program
    return {str(k): str(v) for k, v in content.items()} if isinstance(content, dict) else {}


def _video_comment(path: Path) -> str:
    with path.open("rb") as data, av.open(data, format=container(path)) as file:
        return file.metadata.get("comment", "")


def _picture_comment(path: Path) -> str:
    if sniff(path) not in ("GIF", "WEBP"):
        raise ValueError(f"{path} is not a clip in a format that pcs writes (mp4, GIF, WebP or a folder of frames)")
    with opened(path) as image:
        if image.format == "GIF":
            comment = image.info.get("comment", b"")
            return comment.decode("utf-8", "replace") if isinstance(comment, bytes) else str(comment)
        return str(image.getexif().get(DESCRIPTION, ""))
