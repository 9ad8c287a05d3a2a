"""Supports families that are built on another family, such as image models with added motion modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.backbones.protocol import Backbone

# The entry-point group. Each entry maps a family to "module:function". The function takes a model and the folder with the
# network to add (or None), and returns the extended model.
GROUP = "pcs.built_on"


@dataclass(frozen=True)
class AddedNetwork:
    """Describes a network that was added to a model, for the generated code that loads exports."""

    argument: str  # its argument in the diffusers pipeline's `from_pretrained`
    kind: str  # its diffusers class
    # an import line, and an expression that gives the network's folder; None if the user chose the folder
    find: tuple[str, str] | None


def built_on(family: str, folder: Path | None = None) -> Callable[[Backbone], Backbone] | None:
    """Returns the function that turns the underlying model into a model of this family, to be passed to `load_backbone` as
    `prepare`. Returns None if the family is not built on another family.

    Args:
        folder: the folder with the network to add. If None, the network that comes with the model is added

    Raises:
        ValueError: when a folder is given, but the family is not built on another family
    """
    from importlib.metadata import entry_points

    entry = next((e for e in entry_points(group=GROUP) if e.name == family), None)
    if entry is not None:
        return partial(_extended, entry, folder)
    if folder is not None:
        raise ValueError(f"--motion-adapter {folder}: a concept learned on {family} has no motion module")
    return None


def _extended(entry: Any, folder: Path | None, backbone: Backbone) -> Backbone:
    return entry.load()(backbone, folder)
