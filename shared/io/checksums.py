"""Computes hashes of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path


def sha256(path: str | os.PathLike[str]) -> str:
    """Returns the hexadecimal sha256 of a file's bytes.

    For a folder (a clip's frames), the hash covers the names and bytes of the files directly inside it.
    """
    state = hashlib.sha256()
    if (folder := Path(path)).is_dir():
        for file in sorted(p for p in folder.iterdir() if p.is_file()):
            state.update(f"{file.name}\0{sha256(file)}\0".encode(errors="surrogateescape"))
        return state.hexdigest()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            state.update(block)
    return state.hexdigest()
