"""Handles adapters that are not saved in concepts: those for individual files (`per_source`), and temporary ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shared.backbones.protocol import Backbone
from shared.recipe.schema import Recipe
from shared.trainable import Trainable, TrainableGroup
from shared.types import Subject


def adapter_set(slot: str, number: int) -> str:
    """Returns the name of the adapter set for one part and one file; no concept can have such a name."""
    return f"{slot}@{number + 1}"


def sets_by_file(phases: Sequence[tuple[str, Recipe]], subjects: Mapping[str, Subject]) -> dict[str, tuple[str, ...]]:
    """Maps each file of every subject to its own adapter sets. The result is empty if no part uses `per_source`."""
    slots = dict.fromkeys(s for _, phase in phases for s, part in phase.trainable.items() if part.per_source)
    return {str(f): tuple(adapter_set(s, n) for s in slots) for n, f in enumerate(_files(subjects)) if slots}


def temporary_sets(phases: Sequence[tuple[str, Recipe]]) -> tuple[str, ...]:
    """Returns the adapter sets of temporary parts.

    Raises ValueError when a permanent part uses one of these sets, because the part would be dropped along with
    the temporary ones.
    """
    parts = [(slot, part) for _, phase in phases for slot, part in phase.trainable.items() if part.adapter_set]
    sets = dict.fromkeys(part.adapter_set for _, part in parts if part.temporary)
    for slot, part in parts:
        if part.adapter_set in sets and not part.temporary:
            raise ValueError(
                f"trainable.{slot}.adapter_set = {part.adapter_set!r}: temporary parts use this name, but this part is "
                "not temporary; choose another name"
            )
    return tuple(sets)


def inject_each(
    part: Trainable, backbone: Backbone, slot: str, subjects: Mapping[str, Subject], seed: int
) -> TrainableGroup:
    """Injects one adapter for each of the subjects' files, and returns them as one group.

    Each adapter is on only in training steps that use its file.
    """
    groups = []
    for number in range(len(_files(subjects))):
        name = adapter_set(slot, number)
        groups.append(part.inject(backbone, name, name, seed))  # the name keeps the files' tensors separate
        backbone.set_strength(name, 0.0)
    return replace(groups[0], slot=slot, parameters=[p for group in groups for p in group.parameters])


def _files(subjects: Mapping[str, Subject]) -> list[Path]:
    return list(dict.fromkeys(path for subject in subjects.values() for path in subject.files))
