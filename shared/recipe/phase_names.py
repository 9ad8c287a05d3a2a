"""Which phases may be named where: a name that a recipe does not have is a mistake, unless it begins a phase of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.config import unknown
from shared.recipe.overlay import mapping

#: What makes a phase of its own of an entry in a file: it says what it trains, or that it does something else.
_OWN = ("trainable", "task")


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
