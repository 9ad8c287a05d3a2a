"""Hashes of files, and names of files that stay inside their folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PureWindowsPath


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    state = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()


def safe_relative(root: str | os.PathLike[str], name: str) -> Path:
    """The file `name` inside the folder `root`. ValueError when the name, or a link on the way, leads out of it."""
    pure = PureWindowsPath(name)  # knows both / and \, and drives
    if not name or name[0] == "~" or "\0" in name or pure.drive or pure.root or ".." in pure.parts:
        raise ValueError(f"{name!r} is not a plain path inside {root}")
    base = Path(root).resolve()
    path = base.joinpath(*pure.parts)
    if base not in path.resolve().parents:
        raise ValueError(f"{name!r} leads out of {root}")
    return path
