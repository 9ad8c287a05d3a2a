"""Checks the names of a recipe's phases, and builds the full recipe of each phase."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from shared.config import default_kinds, merge, unknown, validate
from shared.recipe.overlay import mapping
from shared.recipe.schema import Recipe, dump

R = TypeVar("R", bound=Recipe)

#: A file may add a new phase if the phase sets one of these keys.
_OWN = ("trainable", "task")
#: Settings of the whole run, which a phase cannot change.
_ONCE = frozenset(
    (
        *("method", "title", "papers", "taxonomy", "kind", "subject", "subjects", "backbone", "output", "name"),
        *("modifier", "preview", "phases"),
    )
)


def check_phases(layer: Mapping[str, Any], below: Mapping[str, Any], file: str = "") -> None:
    """Checks the phases in `layer` against the phases in `below`, the settings to which the layer is applied.

    A recipe file, named by `file`, may add a phase if the phase sets `trainable` or `task`. The command line, for which
    `file` is empty, may not add phases.

    Raises:
        ValueError: if a phase is unknown. The message lists the existing phases.
    """
    known = mapping(below.get("phases"))
    for name, phase in mapping(layer.get("phases")).items():
        if name in known or (file and any(key in mapping(phase) for key in _OWN)):
            continue
        head = f"{file}: " if file else ""
        more = " A new phase must set trainable or task." if file else ""
        raise ValueError(f"{head}phases.{name}: {unknown(str(name), map(str, known), 'phase')}{more}")


def expand_phases(recipe: R) -> Iterator[tuple[str, R]]:
    """Yields (name, recipe) for each phase, with the phase's overlay applied to the recipe. A recipe without
    phases is yielded unchanged, with the name of its task.

    A phase drops a part of the recipe by setting the part to null.
    """
    if not recipe.phases:
        yield recipe.task.kind, recipe
        return
    base = dump(recipe)
    base.pop("phases")
    for name, phase in recipe.phases.items():
        fixed = sorted(_ONCE & phase.keys())
        if fixed:
            raise ValueError(f"phases.{name}.{fixed[0]}: all phases share this setting; set it outside the phases")
        yield name, validate(type(recipe), merge(base, phase, default_kinds(type(recipe))), where=f"phases.{name}")


def learns_subjects(recipe: Recipe) -> bool:
    """Returns whether any phase learns the subjects. If not, the run uses the subjects' pictures only for comparison."""
    return any(phase.task.learns_subjects for _, phase in expand_phases(recipe))


def check_learns(recipe: Recipe) -> None:
    """Raises ValueError if no phase learns the subjects."""
    if not learns_subjects(recipe):
        raise ValueError("no phase of the recipe learns the subject; set task: tune in at least one phase")
