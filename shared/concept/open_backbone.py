"""Opens the backbone that a concept was learned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.backbones.load import TOYBOX, load_backbone
from shared.backbones.protocol import Backbone
from shared.concept.concept_folder import META, Concept, read_meta
from shared.concept.model_locations import known_path, remember


def load_backbone_of(concept: Concept, backbone: str | None = None, **options: Any) -> Backbone:
    """Loads `backbone` if it is given, and otherwise the model that the concept was learned on.

    `options` are passed to `load_backbone`. A concept may come from an untrusted source, so unless the option
    `download` is set, its model must be the toybox, a model whose weights have been loaded on this machine before, a
    hub id in the local hub cache, or an existing path.

    Raises ValueError, naming the concept and what to give instead, if the model is not on this machine.
    """
    if backbone and backbone != str(where_learned(concept)):
        model = load_backbone(backbone, **options)
        remember(model)
        return model
    info = concept.meta.backbone
    what = f"the concept {concept.name!r} was learned on {info.name} ({info.family})"
    where = where_learned(concept)
    available = where == TOYBOX or Path(where).exists() or _in_hub_cache(info.name) or options.get("download")
    if not available:
        raise ValueError(
            f"{what}, and that model is not known on this machine. Give its location (a folder or a hub id) "
            "with --backbone PATH, or with backbone=PATH for a command that takes a recipe"
        )
    try:
        model = load_backbone(where, **options)
    except ValueError as error:
        raise ValueError(f"{what}: {error} Give the model's current location with --backbone PATH") from error
    if backbone:
        remember(model)
    return model


def where_learned(concept: Concept) -> str | Path:
    """Returns the path of the model that a concept was learned on, or the model's name if its path is not known."""
    info = concept.meta.backbone
    return info.name if info.name == TOYBOX else known_path(info.checkpoint) or info.name


def known_model(folder: Path) -> Path | None:
    """Returns the local path of the model that a concept was learned on. Reads only the concept's description.

    Returns None for the toybox, for a model that is not known on this machine, and for a folder that is not a concept.
    Such a folder is reported later, when the concept is read.
    """
    try:
        info = read_meta(folder / META).backbone
    except (OSError, ValueError):
        return None
    return None if info.name == TOYBOX else known_path(info.checkpoint)


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "model_index.json"), str)
    except HFValidationError:  # not a hub id
        return False
