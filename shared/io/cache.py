"""Locates the cache, a folder of files that are kept between runs and can be recreated."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns $PCS_CACHE if it is set, and otherwise the folder `pcs` in the user's cache folder.

    Among other files, the cache contains class pictures and the locations of local models.
    """
    root = os.environ.get("PCS_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "pcs")
    return Path(root).expanduser()
