"""Sorts a folder's files into pictures, their captions and masks, and everything else."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.config import absent, expanded
from shared.io.caption_files import METADATA, caption_files, looks_like_captions, unused_rows
from shared.io.failures import of_the_machine
from shared.io.foreign_files import MARK
from shared.io.terminal import encodable, names

PathLike = str | os.PathLike[str]

_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
)
_PPM = tuple(b"P%d" % n for n in range(1, 7))
_WEAK = {".bmp": "BMP", ".dib": "BMP", ".pbm": "PPM", ".pgm": "PPM", ".ppm": "PPM", ".pnm": "PPM"}
MASK_ENDS = (".mask", "-mask", "_mask")


@dataclass(frozen=True)
class Listing:
    """Pictures in order, with their caption files and masks if they have any."""

    pictures: tuple[Path, ...]
    captions: dict[Path, Path]  # picture -> the file that contains its caption
    masks: dict[Path, Path]  # picture -> mask picture
    warnings: tuple[str, ...] = ()


def sniff(path: Path) -> str | None:
    """Returns the picture format of a file's contents ("PNG", "JPEG", …, "HEIC"), or None if it is not a picture.

    A file with a two-letter signature (BMP, PPM) must also have the right extension. Raises OSError if the file cannot be
    opened.
    """
    with path.open("rb") as stream:
        head = stream.read(64)
    for mark, name in _MAGIC:
        if head.startswith(mark):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8:]
        if b"avif" in brands or b"avis" in brands:
            return "AVIF"
        return "HEIC" if any(brand in brands for brand in _HEIC) else None
    weak = _WEAK.get(path.suffix.lower())
    if (weak == "BMP" and head[:2] == b"BM") or (weak == "PPM" and head[:2] in _PPM):
        return weak
    return None


def list_pictures(images: PathLike | Sequence[PathLike]) -> tuple[tuple[Path, ...], list[str]]:
    """Lists the pictures given as a folder (sorted by name), a single file, or a list of files and folders (in the
    given order).

    Anything that is not a picture (hidden files, text, empty files, subfolders) is skipped and listed in one
    UserWarning per folder. The pictures' captions (`shared.io.caption_files`) and masks (`masks/NAME.png`,
    `NAME.mask.png`, `NAME-mask.png`, `NAME_mask.png`) are not listed. Returns the pictures and the text of the
    warnings.

    Raises ValueError, stating what was found, if a path does not exist, a given file is not a picture, or there are no
    pictures.
    """
    listing = scan(images)
    return listing.pictures, list(listing.warnings)


def scan(images: PathLike | Sequence[PathLike]) -> Listing:
    """Like `list_pictures`, but also returns captions and masks."""
    paths = [images] if isinstance(images, (str, os.PathLike)) else list(images)
    if not paths:
        raise ValueError("no pictures: the list of files is empty")
    pictures: dict[Path, None] = {}
    captions: dict[Path, Path] = {}
    masks: dict[Path, Path] = {}
    notes: list[str] = []
    seen: dict[Path, list[Path]] = {}
    for item in paths:
        path = expanded(item)
        part = listing_of(path) if path.is_dir() else _file(path, seen)
        notes += part.warnings
        twice = [p.name for p in part.pictures if p in pictures]
        if twice:
            notes.append(f"listed twice but used only once: {names(twice)}")
        pictures.update(dict.fromkeys(part.pictures))
        captions.update(part.captions)
        masks.update(part.masks)
    notes = list(dict.fromkeys(notes))  # several given files may share one metadata.jsonl
    for note in notes:
        warnings.warn(encodable(note), UserWarning, stacklevel=3)
    return Listing(tuple(pictures), captions, masks, tuple(notes))


def _file(path: Path, seen: dict[Path, list[Path]]) -> Listing:
    """Lists a single file. `seen` caches the possible masks in each folder."""
    if not path.exists():
        raise ValueError(f"{path} {absent(path)}")
    reason = _not_a_picture(path)
    if reason:
        raise ValueError(f"{path} is not a picture ({reason})")
    if path.parent not in seen:
        seen[path.parent] = _mask_files(path.parent)
    notes = tuple(unused_rows([path], path.parent))
    return Listing((path,), caption_files([path], path.parent), _masks([path], seen[path.parent]), notes)


def listing_of(folder: Path, known: Collection[str] = ()) -> Listing:
    """Like `scan` for one folder, but returns warnings without issuing them. Files named in `known` are ignored."""
    entries = sorted((p for p in folder.iterdir() if p.name not in known), key=lambda p: p.name)
    stray: dict[Path, str] = {}
    pictures: list[Path] = []
    for path in (p for p in entries if p.name != MARK):
        reason = "hidden" if path.name.startswith(".") else _not_a_picture(path)
        if reason:
            stray[path] = reason
        else:
            pictures.append(path)
    stems = {p.stem for p in pictures}
    pictures = [p for p in pictures if owner_stem(p.stem, stems) == p.stem]
    if not pictures:
        what = f"only {names(map(_skipped, stray, stray.values()))}" if stray else "nothing"
        raise ValueError(f"no pictures in {folder}: found {what}")
    candidates = _mask_files(folder)
    captions, masks = caption_files(pictures, folder), _masks(pictures, candidates)
    used = {*captions.values(), *masks.values()}
    stray.update({p: no_caption(p, pictures, used) for p in stray if looks_like_captions(p)})
    stray.update({p: "a mask without a picture" for p in candidates if p not in used and p not in pictures})
    if (folder / "masks").is_dir():
        stray.update({p: why for p in sorted((folder / "masks").iterdir()) if (why := _not_a_picture(p))})
    for path in [p for p in stray if p in used or (p == folder / "masks" and p.is_dir())]:
        del stray[path]
    note = f"{folder}: skipped files that are not pictures: {names(map(_skipped, stray, stray.values()))}"
    return Listing(tuple(pictures), captions, masks, (*unused_rows(pictures, folder), *([note] if stray else [])))


def _skipped(path: Path, reason: str) -> str:
    inside = f"{path.parent.name}/" if path.parent.name == "masks" else ""
    return f"{inside}{path.name} ({reason})"


def _not_a_picture(path: Path) -> str:
    """Returns why a file is not a picture, or "" if it is one."""
    if path.is_dir():
        return "a folder"
    if not path.is_file():
        return absent(path, "not a file")
    try:
        if path.stat().st_size == 0:
            return "empty, 0 bytes"
        return "" if sniff(path) else "not a picture"
    except OSError as error:
        if of_the_machine(error):
            raise
        return f"cannot be opened: {error.strerror}"


def no_caption(file: Path, items: Collection[Path], used: Collection[Path]) -> str:
    """Returns why a possible caption file is not used."""
    if file.name == METADATA:
        return "no captions for the files here, or every file has its own caption file"
    owner = next((p for p in items if _same(file.stem, p)), None)
    other = next((p.name for p in used if owner and _same(p.stem, owner)), "")
    return f"{other} is used as the caption" if other else "a text file that matches no picture or clip"


def _same(stem: str, item: Path) -> bool:
    return stem.casefold() in (item.stem.casefold(), item.name.casefold())


def owner_stem(stem: str, stems: Collection[str]) -> str:
    """Returns the stem of the picture that a mask file belongs to, or the file's own stem if the file is itself a
    picture."""
    for end in MASK_ENDS:
        if stem.endswith(end) and stem.removesuffix(end) in stems:
            return stem.removesuffix(end)
    return stem


def _mask_files(folder: Path) -> list[Path]:
    """Returns all files that may be masks of pictures in this folder, starting with those in `masks/`."""
    inside = sorted((folder / "masks").iterdir()) if (folder / "masks").is_dir() else []
    named = sorted(p for p in folder.iterdir() if p.stem.endswith(MASK_ENDS))
    return [p for p in (*inside, *named) if not p.name.startswith(".") and not _not_a_picture(p)]


def _masks(pictures: Sequence[Path], candidates: Sequence[Path]) -> dict[Path, Path]:
    stems = {p.stem for p in pictures}
    out: dict[Path, Path] = {}
    for mask in candidates:
        owner = owner_stem(mask.stem, stems)
        for picture in pictures:
            if picture.stem == owner and mask != picture:
                out.setdefault(picture, mask)
    return out
