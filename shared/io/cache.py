"""Where things are kept between runs that can be made or found again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$PCS_CACHE, else the user's cache folder: class pictures, and where models are on this machine."""
    root = os.environ.get("PCS_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "pcs")
    return Path(root).expanduser()
