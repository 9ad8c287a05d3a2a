"""Families that are built on another: an image model with motion modules, for example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.backbones.protocol import Backbone

# entry points: family = "module:function", (a model, the folder of what is added) -> its extension
GROUP = "pcs.built_on"


@dataclass(frozen=True)
class AddedNetwork:
    """A network that was added to a model, described for the code with which exports are loaded."""

    argument: str  # of the diffusers pipeline's `from_pretrained`
    kind: str  # its diffusers class
    find: (
        tuple[str, str] | None
    )  # an import line, and an expression for the network's folder; None: a folder of the user's


def built_on(family: str, folder: Path | None = None) -> Callable[[Backbone], Backbone] | None:
    """Returns the function that extends the model on which this family is built, for `load_backbone`'s `prepare`; None if the
    family is not built on another.

    Args:
        folder: contains what is added; None: the model's own

    Raises:
        ValueError: a folder is given, but the family is not built on another
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
