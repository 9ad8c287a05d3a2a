"""Keyword arguments for typer options and arguments that are paths, for example `typer.Option(None, **PATH)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def _path(text: Any) -> Path:
    import typer

    from shared.config import expanded  # slow to import

    if text == "":
        raise typer.BadParameter("is empty (perhaps it was given as a shell variable that is not set)")
    return expanded(text)


#: Used for every option and argument that is a path. Expands `~` even in `--out=~/x`, where a shell does not.
PATH: dict[str, Any] = {"parser": _path, "metavar": "PATH"}
