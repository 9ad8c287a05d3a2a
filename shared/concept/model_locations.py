"""Remembers where models are stored on this machine. Concepts are meant to be shared, so they do not record paths.

The file `models.json` in the user's cache maps fingerprints of weights to paths. It may be removed at any time.
"""

from __future__ import annotations

import json
from pathlib import Path

from shared.backbones.protocol import Backbone
from shared.io.cache import cache_folder
from shared.io.outputs import atomic_write

_FILE = "models.json"
_MOST = 1000  # maximum number of entries; the oldest are dropped first


def remember(backbone: Backbone) -> None:
    """Records the location of a model that is a local folder or file. It is not an error if the cache cannot be
    written; the user then has to give the model's location."""
    path = Path(backbone.name)
    if not path.is_absolute() or not path.exists():
        return
    known = _read()
    if known.get(backbone.checkpoint) == str(path):
        return
    known.pop(backbone.checkpoint, None)
    known[backbone.checkpoint] = str(path)
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        with atomic_write(cache_folder() / _FILE) as file:
            file.write_text(json.dumps(dict(list(known.items())[-_MOST:]), indent=1), encoding="utf-8")
    except OSError:
        return


def known_path(checkpoint: str) -> Path | None:
    """Returns the last known path of a model with these weights. Returns None if no path is known or the path no longer
    exists."""
    folder = _read().get(checkpoint)
    return Path(folder) if folder and Path(folder).exists() else None


def _read() -> dict[str, str]:
    try:
        data = json.loads((cache_folder() / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {k: v for k, v in data.items() if isinstance(v, str)} if isinstance(data, dict) else {}
