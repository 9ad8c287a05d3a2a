"""Lists the files and folders that a recipe reads, so that no output overwrites them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from shared.backbones.load import WORLDS
from shared.config import expanded
from shared.recipe.phases import expand_phases
from shared.recipe.schema import Recipe

_WRITTEN = "output"
_NAMES_OR_PATHS = ("backbone", "motion_adapter")  # `NameOrPath`


def paths_read(recipe: Recipe) -> list[Path]:
    """Returns the paths (pictures, masks, captions, models) that any phase of a recipe reads, excluding its output."""
    return list(dict.fromkeys(path for _, phase in expand_phases(recipe) for path in _paths(phase)))


def files_read(recipe: Recipe) -> list[Path]:
    """Returns the files that any phase of a recipe reads, excluding models. Pictures in folders are not listed."""
    models = {expanded(str(getattr(recipe, name))) for name in _NAMES_OR_PATHS if getattr(recipe, name, None)}
    return [path for path in map(expanded, paths_read(recipe)) if path.is_file() and path not in models]


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            inner = getattr(value, name)
            if name == _WRITTEN:
                continue
            if isinstance(inner, str) and name in _NAMES_OR_PATHS:
                yield from [expanded(inner)] if inner not in WORLDS and expanded(inner).exists() else ()
            yield from _paths(inner)
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner)


def sources_of(kind: str, recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Lists the settings of a recipe's sources of one kind, first those of the recipe and then those of its phases. The
    recipe has the form in which concepts save it. The kinds `references` and `clips` read the user's own files."""
    phases = recipe.get("phases")
    sources = [part.get("sources") for part in (recipe, *(phases.values() if isinstance(phases, Mapping) else ()))]
    named = [(key, source) for found in sources if isinstance(found, Mapping) for key, source in found.items()]
    return [source for key, source in named if isinstance(source, Mapping) and source.get("kind", key) == kind]
