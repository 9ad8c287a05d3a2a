"""Resolves file names that come from untrusted files, and rejects names that point outside their folder."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath


def safe_relative(root: str | os.PathLike[str], name: str) -> Path:
    """Returns the file `name` inside the folder `root`. Raises ValueError if the name, or a link in its path, points
    outside the folder."""
    pure = PureWindowsPath(name)  # understands /, \ and drive letters
    if not name or name[0] == "~" or "\0" in name or pure.drive or pure.root or ".." in pure.parts:
        raise ValueError(f"{name!r} is not a plain path inside {root}")
    base = Path(root).resolve()
    path = base.joinpath(*pure.parts)
    if base not in path.resolve().parents:
        raise ValueError(f"{name!r} points outside {root}")
    return path
