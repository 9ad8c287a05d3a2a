"""Captions in the usual formats: a text file next to each picture or clip, or one `metadata.jsonl` for all of them.

Text files are `NAME.txt`, `NAME.caption` or `NAME.png.txt`, with extensions in upper or lower case; the first in this list
wins. `metadata.jsonl` is Hugging Face's image-folder format: {"file_name": "a.png", "text": "a photo of a mug"} on each line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.config import expanded
from shared.io.terminal import names
from shared.io.text_files import read_text_file

METADATA = "metadata.jsonl"
ENDINGS = (".txt", ".caption")
_KEYS = ("text", "caption", "prompt")


def caption_files(items: Sequence[Path], folder: Path) -> dict[Path, Path]:
    """Maps each picture or clip (a file or a folder of frames) to the file in `folder` that holds its caption."""
    there: dict[tuple[str, str], Path] = {}
    for path in sorted(folder.iterdir()):
        if looks_like_captions(path):
            there.setdefault((path.stem, path.suffix.lower()), path)
    listed = _listed(there.pop((Path(METADATA).stem, ".jsonl"), None))
    out: dict[Path, Path] = {}
    for item in items:
        stems = (item.name,) if item.is_dir() else (item.stem, item.name)
        found = next((there[s, e] for s in stems for e in ENDINGS if (s, e) in there), None)
        found = found or (folder / METADATA if item.name in listed else None)
        if found:
            out[item] = found
    return out


def looks_like_captions(path: Path) -> bool:
    """Whether a file is named like a caption file."""
    named = path.suffix.lower() in ENDINGS or path.name == METADATA
    return named and not path.name.startswith(".") and path.is_file()


def caption_text(file: Path, item: Path) -> str:
    """Returns the caption of a picture or clip from the file that `caption_files` found, with line breaks turned into spaces.

    Raises ValueError, naming the file, if it is not UTF-8 text or a line of `metadata.jsonl` cannot be read.
    """
    text = _listed(file).get(item.name, "") if file.name == METADATA else read_text_file(file, "the caption")
    return " ".join(text.split())


def _listed(file: Path | None) -> dict[str, str]:
    """Returns file name -> caption from a `metadata.jsonl`; lines without a caption are ignored."""
    out: dict[str, str] = {}
    for number, line in enumerate(read_text_file(file, "the captions").splitlines() if file else (), 1):
        if not line.strip():
            continue
        row = _row(line)
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f'{file}, line {number}: write {{"file_name": "a.png", "text": "a photo of a mug"}}')
        said = next((row[key] for key in _KEYS if isinstance(row.get(key), str)), None)
        if said is not None:
            out[Path(row["file_name"]).name] = said
    return out


def _row(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def given_captions(items: Sequence[Path], folder: str | os.PathLike[str], a_name: str, what: str) -> dict[Path, Path]:
    """Like `caption_files`, for a caption folder given by the user. Raises ValueError if it has no caption for any item.

    Args:
        a_name: how messages say whose name a caption file must have, for example "a picture's"
        what: what messages call the items, for example "pictures"
    """
    root = expanded(folder)
    if not root.is_dir():
        raise ValueError(f"captions: {root} is not a folder")
    out = caption_files(items, root)
    if not out:
        seen = names(p.name for p in sorted(root.iterdir()) if not p.name.startswith(".")) or "nothing"
        raise ValueError(
            f"captions: no file in {root} has {a_name} name; it holds {seen}, while the {what} are "
            f"{names(p.name for p in items)}"
        )
    return out
