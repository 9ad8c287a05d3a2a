"""Reads captions from a text file next to each picture or clip, or from one `metadata.jsonl` for all of them.

The text file for `NAME.png` is called `NAME.txt`, `NAME.caption` or `NAME.png.txt`. If there are several, the first in
this list is used. A name that differs only in case also matches, provided that it can belong to only one file.
`metadata.jsonl` is in Hugging Face's image-folder format, with {"file_name": "a.png", "text": "a photo of a mug"} on
each line.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.config import absent, expanded
from shared.io.terminal import encodable, names
from shared.io.text_files import read_text_file

METADATA = "metadata.jsonl"
ENDINGS = (".txt", ".caption")
_KEYS = ("text", "caption", "prompt")
_SHOWN = 8  # the maximum number of lines of a `metadata.jsonl` to report


def caption_files(items: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Maps each picture or clip (a file or a folder of frames) to the file in `folder` that contains its caption."""
    entries = sorted(folder.iterdir())
    there: dict[tuple[str, str], Path] = {}
    for path in entries:
        if looks_like_captions(path):
            there.setdefault((path.stem, path.suffix.lower()), path)
    listed = _listed(there.pop((Path(METADATA).stem, ".jsonl"), None))
    spelled = _spelled(n for p in [*items, *entries] if not looks_like_captions(p) for n in (*_stems(p), p.name))
    alike = _spelled(stem for stem, _ in there)
    out: dict[Path, Path] = {}
    for item in items:
        stems = [*_stems(item)]
        stems += [s for stem in _stems(item) if (s := _other_case(stem, alike, spelled))]
        found = next((there[s, e] for s in stems for e in ENDINGS if (s, e) in there), None)
        found = found or (folder / METADATA if _row_for(item, listed, spelled) else None)
        if found:
            out[item] = found
    return out


def _stems(item: Path) -> tuple[str, ...]:
    return (item.name,) if item.is_dir() else (item.stem, item.name)


def _spelled(names: Iterable[str]) -> dict[str, set[str]]:
    """Maps the case-folded form of each name to all of its spellings."""
    out: dict[str, set[str]] = {}
    for name in names:
        out.setdefault(name.casefold(), set()).add(name)
    return out


def _other_case(name: str, known: Mapping[str, set[str]], files: Mapping[str, set[str]]) -> str | None:
    """Returns the name in `known` that differs from `name` at most in case. Returns None if there is not exactly one,
    or if it could also belong to another name in `files`."""
    spellings = known.get(name.casefold(), set())
    return next(iter(spellings)) if len(spellings) == 1 == len(files.get(name.casefold(), {name})) else None


def _row_for(item: Path, listed: Mapping[str, str], files: Mapping[str, set[str]]) -> str | None:
    return item.name if item.name in listed else _other_case(item.name, _spelled(listed), files)


def unused_rows(items: Iterable[Path], folder: Path) -> list[str]:
    """Returns one message, with the reason, for each caption in the folder's `metadata.jsonl` that is not used."""
    file = folder / METADATA
    if not looks_like_captions(file):
        return []
    here = {p.name.casefold() for p in (*items, *folder.iterdir())}
    notes = []
    for number, row in _rows(file):
        key = next((key for key in _KEYS if row.get(key) is not None), None)
        name = Path(row["file_name"]).name
        if key and _said(row) is None:
            notes.append(f"{file}, line {number}: {key} = {str(row[key])[:80]} is not text")
        elif key and name.casefold() not in here:
            notes.append(f"{file}, line {number}: there is no file called {name} here")
    more = [f"{file}: {len(notes) - _SHOWN} more lines are not used"] if len(notes) > _SHOWN else []
    return notes[:_SHOWN] + more


def looks_like_captions(path: Path) -> bool:
    """Whether a file has the name of a caption file."""
    named = path.suffix.lower() in ENDINGS or path.name == METADATA
    return named and not path.name.startswith(".") and path.is_file()


def caption_text(file: Path, item: Path) -> str:
    """Returns the caption of a picture or clip from the file that `caption_files` found, on a single line.

    Raises ValueError, naming the file, if the file is not UTF-8 text or a line of `metadata.jsonl` cannot be read.
    """
    if file.name == METADATA:
        listed = _listed(file)
        text = listed.get(_row_for(item, listed, {}) or "", "")
    else:
        text = read_text_file(file, "the caption")
    return " ".join(text.split())


def _listed(file: Path | None) -> dict[str, str]:
    """Maps file names to captions, as listed in a `metadata.jsonl`. Lines without a caption are left out."""
    return {Path(row["file_name"]).name: said for _, row in _rows(file) if (said := _said(row)) is not None}


def _said(row: Mapping[str, Any]) -> str | None:
    return next((row[key] for key in _KEYS if isinstance(row.get(key), str)), None)


def _rows(file: Path | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line number and contents of each row. Raises ValueError for a line that cannot be read."""
    for number, line in enumerate(read_text_file(file, "the captions").splitlines() if file else (), 1):
        if not line.strip():
            continue
        row = _row(line)
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(
                f'{file}, line {number} must look like {{"file_name": "a.png", "text": "a photo of a mug"}}'
            )
        yield number, row


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def given_captions(items: Sequence[Path], folder: str | os.PathLike[str], a_name: str, what: str) -> dict[Path, Path]:
    """Does the same as `caption_files` for a caption folder that the user gave. Raises ValueError if the folder
    contains no caption for any of the items.

    Args:
        a_name: the possessive used in messages about the name that a caption file must have, such as "a picture's"
        what: the word for the items in messages, such as "pictures"
    """
    root = expanded(folder)
    if not root.is_dir():
        raise ValueError(f"captions: {root} {absent(root, 'is not a folder')}")
    out = caption_files(items, root)
    if not out:
        seen = names(p.name for p in sorted(root.iterdir()) if not p.name.startswith(".")) or "nothing"
        raise ValueError(
            f"captions: no file in {root} has {a_name} name; the folder contains {seen}, while the {what} are "
            f"{names(p.name for p in items)}"
        )
    for note in unused_rows(items, root):
        warnings.warn(encodable(note), UserWarning, stacklevel=4)
    return out
