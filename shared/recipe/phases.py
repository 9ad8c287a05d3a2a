"""The phases of a recipe: which may be named where, and the whole recipe of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from shared.config import default_kinds, merge, unknown, validate
from shared.recipe.overlay import mapping
from shared.recipe.schema import Recipe, dump

R = TypeVar("R", bound=Recipe)

#: What makes a phase of its own of an entry in a file: it says what it trains, or that it does something else.
_OWN = ("trainable", "task")
#: What a run has once: a phase cannot change it.
_ONCE = frozenset(
    (
        *("method", "title", "papers", "taxonomy", "kind", "subject", "subjects", "backbone", "output", "name"),
        *("modifier", "preview", "phases"),
    )
)


def check_phases(layer: Mapping[str, Any], below: Mapping[str, Any], file: str = "") -> None:
    """Checks the phases that `layer` names against those of `below`, what it is laid on.

    A variant's file may add a phase, one that says its `trainable` or its `task`; the command line (no `file`) may not.

    Raises:
        ValueError: names the phase and those there are
    """
    known = mapping(below.get("phases"))
    for name, phase in mapping(layer.get("phases")).items():
        if name in known or (file and any(key in mapping(phase) for key in _OWN)):
            continue
        head = f"{file}: " if file else ""
        more = " A phase of its own says its trainable, or its task." if file else ""
        raise ValueError(f"{head}phases.{name}: {unknown(str(name), map(str, known), 'phase')}{more}")


def expand_phases(recipe: R) -> Iterator[tuple[str, R]]:
    """(name, recipe) of each phase: the recipe with the phase's overlay laid on; one phase where none are named.

    A part that the recipe has and a phase does not want is set to null in the phase.
    """
    if not recipe.phases:
        yield recipe.task.kind, recipe
        return
    base = dump(recipe)
    base.pop("phases")
    for name, phase in recipe.phases.items():
        fixed = sorted(_ONCE & phase.keys())
        if fixed:
            raise ValueError(f"phases.{name}.{fixed[0]}: this is the same in all phases; say it outside of them")
        yield name, validate(type(recipe), merge(base, phase, default_kinds(type(recipe))), where=f"phases.{name}")
