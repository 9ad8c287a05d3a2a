"""The backbone that a concept was learned on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shared.backbones.load import TOYBOX, load_backbone
from shared.backbones.protocol import Backbone
from shared.concept.concept_folder import META, Concept, read_meta
from shared.concept.model_locations import known_path, remember


def load_backbone_of(concept: Concept, backbone: str | None = None, **options: Any) -> Backbone:
    """`backbone` where it is given, else the model that the concept was learned on; `options` as of `load_backbone`.

    A concept may come from anywhere, so what it names is never downloaded: it is the toybox, a model with the same
    weights that this machine has seen before, a hub id in the hub's cache here, or a folder of that name.

    ValueError, naming the concept and what to say instead, when the model is not here.
    """
    if backbone:
        model = load_backbone(backbone, **options)
        remember(model)
        return model
    info = concept.meta.backbone
    what = f"the concept {concept.name!r} was learned on {info.name} ({info.family})"
    where = where_learned(concept)
    available = where == TOYBOX or Path(where).exists() or _in_hub_cache(info.name) or options.get("download")
    if not available:
        raise ValueError(
            f"{what}, and that model is not known here. Say where it is with --backbone PATH (or a hub id)"
        )
    try:
        return load_backbone(where, **options)
    except ValueError as error:
        raise ValueError(f"{what}: {error} Say where that model is now with --backbone PATH") from error


def where_learned(concept: Concept) -> str | Path:
    """The model that a concept was learned on: the toybox, where one of its weights was last seen here, or its name."""
    info = concept.meta.backbone
    return info.name if info.name == TOYBOX else known_path(info.checkpoint) or info.name


def known_model(folder: Path) -> Path | None:
    """Where the model lies that a concept was learned on, from its description alone; None where that is not known here, or
    the folder is no concept (whoever reads it says so)."""
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
    except HFValidationError:  # no hub id
        return False
