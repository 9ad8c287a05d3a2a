"""Determines which files in a folder were written by pcs. A folder may be replaced only if it contains no other files.

Concepts, reports, exports, checkpoints and benchmark cells list their files in their JSON; pictures are marked in their
PNG text. Every other output folder contains a list of its files. `atomic_folder` writes this list at the end, whereas
training adds each file to the list before writing the file.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from shared.io.failures import of_the_machine, writing
from shared.io.temporary_names import is_temporary

MARK = ".pcs-output"  # the hidden list of files
_NOISE = {MARK, ".DS_Store", "Thumbs.db", "desktop.ini"}  # our list, and the files that file managers leave behind
_MAX_JSON = 64 * 1024 * 1024  # bytes
_MADE = "pcs"  # the PNG text key that marks generated pictures
_ALBUM = {"toybox-subject", "toybox-style"}  # the corresponding keys for pictures of held-out objects
_CHECKPOINT = re.compile(r"checkpoint-\d\d-\d{7}x*")
_CHECKPOINT_FILES = {"state.json", *(f"{n}.safetensors" for n in ("learned", "optimizer", "best", "carried"))}


def foreign_files(folder: Path, most: int = 4) -> list[str]:
    """Returns up to `most` files in a folder and its subfolders that are not recorded as written by pcs.

    Paths are relative to the folder. Links are not followed, and they count as foreign.
    """
    return list(islice(_foreign_files(folder, frozenset(), ""), most))


def mark(folder: Path) -> None:
    """Writes a list of a new folder's files into the folder, unless the files already show that pcs wrote them."""
    if foreign_files(folder, 1):
        files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file()]
        _write_mark(folder, [f for f in files if f != MARK])


def claim(folder: Path, file: str, made: bool = False) -> None:
    """Adds a file to the list of a folder that pcs fills gradually. Call this before writing the file.

    `file` is relative to the folder. Raises ValueError if a file with that name already exists and was not
    written by pcs, unless `made` is set, meaning that the caller has just created it.
    """
    if file in _claimed(folder):
        return
    if os.path.lexists(folder / file) and not made:
        raise ValueError(f"{folder / file} was not written by pcs and would be replaced: move it elsewhere first")
    folder.mkdir(parents=True, exist_ok=True)
    _write_mark(folder, [*_claimed(folder), file])


def is_claimed(folder: Path, file: str) -> bool:
    """Whether `file`, a path relative to the folder, is in the folder's list. The file need not exist."""
    return file in _claimed(folder)


def is_cell(path: Path) -> bool:
    """Whether a file is a saved benchmark cell."""
    content = _json(path)
    return isinstance(content, dict) and _LISTS["cell.json"][0] <= content.keys()


def _claimed(folder: Path) -> list[str]:
    content = _json(folder / MARK)
    return list(content["files"]) if isinstance(content, dict) and isinstance(content.get("files"), list) else []


def _write_mark(folder: Path, files: list[str]) -> None:
    temporary = folder / f"{MARK}.{os.getpid()}"
    with writing(folder / MARK):
        try:
            temporary.write_text(json.dumps({"written by": "pcs", "files": files}, indent=1), encoding="utf-8")
            os.replace(temporary, folder / MARK)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def remove_written(folder: Path) -> None:
    """Removes only the files that pcs wrote under a folder, the folder's list of files, and any subfolders left
    empty."""
    if folder.is_symlink() or not folder.is_dir():
        return
    kept = {folder / name for name in foreign_files(folder, sys.maxsize)}
    for inside, folders, files in os.walk(folder, topdown=False):
        for path in (Path(inside) / name for name in files):
            if path not in kept and path.name not in _NOISE:
                path.unlink(missing_ok=True)
        for path in (Path(inside) / name for name in folders):
            if not path.is_symlink() and not any(path.iterdir()):
                path.rmdir()
    (folder / MARK).unlink(missing_ok=True)


def _foreign_files(folder: Path, known: Collection[str], prefix: str) -> Iterator[str]:
    known = {*known, *_explained(folder)}
    for entry in sorted(folder.iterdir()):
        if entry.name in _NOISE or entry.name in known or is_temporary(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            inside = f"{entry.name}/"
            below = [k.removeprefix(inside) for k in known if k.startswith(inside)]
            yield from _foreign_files(entry, below, prefix + inside)
        elif not _png_text(entry) & {_MADE, *_ALBUM}:
            yield prefix + entry.name


def _explained(folder: Path) -> set[str]:
    """Returns the files under a folder that are accounted for by the JSON files or marks in that folder."""
    out: set[str] = set()
    for name, (keys, files) in _LISTS.items():
        content = _json(folder / name)
        if isinstance(content, dict) and keys <= content.keys():
            try:
                out |= {name, *map(str, files(content))}
            except (KeyError, TypeError, AttributeError):
                continue  # a file with this name from another program
    if _CHECKPOINT.fullmatch(folder.name) and {p.name for p in folder.iterdir()} <= _CHECKPOINT_FILES:
        # A damaged state.json must not prevent this, or the checkpoint could be neither resumed nor removed.
        out |= _CHECKPOINT_FILES
    if (folder / "comparison.md").is_file() and (folder / "comparison.csv").is_file():
        out |= {"comparison.md", "comparison.csv", "index.html"}
    return out | _of_pictures(folder)


def _of_pictures(folder: Path) -> set[str]:
    """Returns the captions and masks of the pictures of held-out objects."""
    out: set[str] = set()
    for picture in folder.glob("*.png"):
        if _ALBUM & _png_text(picture):
            out |= {f"{picture.stem}.txt", f"masks/{picture.name}"}
    return out


def _report(content: Any) -> list[str]:
    pictures = [row["file"] for row in content["pictures"]]
    return ["pictures.csv", "prompts.csv", "index.html", *pictures, *content["references"]]


# file name -> the keys that show that pcs wrote the file, and a function that returns the other files it accounts for
_LISTS: dict[str, tuple[set[str], Callable[[Any], list[str]]]] = {
    MARK: ({"written by", "files"}, lambda content: list(content["files"])),
    "concept.json": ({"schema_version", "files", "adapter_id"}, lambda content: ["preview.png", *content["files"]]),
    "report.json": ({"schema_version", "pictures", "references"}, _report),
    "export.json": ({"concept", "format", "files"}, lambda content: ["README.txt", *content["files"]]),
    "state.json": ({"written by", "phase", "step", "files"}, lambda content: list(content["files"])),
    "kept.json": ({"phase", "key", "kept"}, lambda content: []),
    "cell.json": ({"key", "error", "report"}, lambda content: []),
}


def _json(path: Path) -> Any:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_JSON:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if of_the_machine(error):
            raise
        return None


def _png_text(path: Path) -> set[str]:
    """Returns the keys of the text chunks in a PNG's header, without decoding the picture. The result is empty
    for any other file."""
    from PIL import Image

    if path.suffix.lower() != ".png" or path.is_symlink():
        return set()
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {k for k in image.info if isinstance(k, str)}
    except Exception as error:  # not a readable PNG, so pcs did not write it
        if of_the_machine(error):
            raise
        return set()
