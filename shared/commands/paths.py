"""Settings for options and arguments that are files or folders, used as in `typer.Option(None, **PATH)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _path(text: Any) -> Path:
    from shared.config import expanded  # slow to import

    return expanded(text)


#: For every option and argument that is a path. `~` is expanded even in `--out=~/x`, where a shell does not expand it.
PATH: dict[str, Any] = {"parser": _path, "metavar": "PATH"}
