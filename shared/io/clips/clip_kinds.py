"""Determines from a file's contents whether it is a video, an animation, a single picture, or none of these."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from shared.io.decode import opened
from shared.io.find_pictures import sniff

Kind = Literal["video", "animation", "picture"]

READABLE = "mp4, mov, webm, mkv, avi, GIF, animated WebP or PNG, or a folder of frames"

#: Formats, under their names in Pillow, that can store the frames of a clip. The pages of a TIFF or MPO are not a clip.
ANIMATED = ("GIF", "WEBP", "PNG")
_MAGIC = (
    (0, b"\x1aE\xdf\xa3", "matroska"),
    (0, b"FLV\x01", "flv"),
    (0, b"OggS", "ogg"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf"),
    (0, b"\0\0\x01\xba", "mpeg"),
    *((4, box, "mov") for box in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")),
)


def container(path: Path) -> str | None:
    """Returns libavformat's name for a video file's container, or None if the file is not a video.

    Callers open the file only in this format. Playlists and similar files, which open other files, are therefore never
    read. Raises OSError if the file cannot be opened.
    """
    with path.open("rb") as stream:
        head = stream.read(400)
    if sniff(path):
        return None  # a picture; HEIC and AVIF begin with the same box as mp4
    for place, mark, name in _MAGIC:
        if head[place:].startswith(mark):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    return "mpegts" if len(head) > 376 and head[0] == head[188] == head[376] == 0x47 else None


def clip_kind(path: Path) -> Kind | None:
    """Returns the kind of a file, or None if its kind is unknown. Raises OSError if the file cannot be opened, and
    ValueError if it is damaged."""
    if container(path):
        return "video"
    kind = sniff(path)
    if kind in ANIMATED:
        with opened(path) as image:
            return "animation" if getattr(image, "n_frames", 1) > 1 else "picture"
    return "picture" if kind else None


def stated_size(path: Path) -> int | None:
    """Returns the minimum size in bytes that the header of an AVI, Matroska or WebM file states. Returns None if there
    is no such header or size."""
    with path.open("rb") as stream:
        head = stream.read(4096)
    if head[:4] == b"RIFF":
        return 8 + int.from_bytes(head[4:8], "little")
    if head[:4] != b"\x1aE\xdf\xa3":
        return None
    length, place = _ebml_size(head, 4)
    # next comes the segment, which contains everything else
    if length is None or head[place + length : place + length + 4] != b"\x18S\x80g":
        return None
    segment, begin = _ebml_size(head, place + length + 4)
    return None if segment is None else begin + segment


def _ebml_size(head: bytes, place: int) -> tuple[int | None, int]:
    """Returns the size of an EBML element (None if unknown) and the position of its content (RFC 8794, section 4)."""
    width = 9 - head[place].bit_length() if place < len(head) and head[place] else 0
    if not width or place + width > len(head):
        return None, place
    value = int.from_bytes(head[place : place + width], "big") & ((1 << 7 * width) - 1)
    return (None if value == (1 << 7 * width) - 1 else value), place + width
