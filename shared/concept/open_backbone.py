"""The backbone that a concept was learned on."""

from __future__ import annotations

from typing import Any

from shared.backbones.load import load_backbone
from shared.backbones.protocol import Backbone
from shared.concept.concept_folder import Concept


def load_backbone_of(concept: Concept, backbone: str | None = None, **options: Any) -> Backbone:
    """`backbone` where it is given, else the model that the concept notes; `options` as of `load_backbone`.

    ValueError, placeholder the concept and what to say instead, when that model is not where it was.
    """
    if backbone:
        return load_backbone(backbone, **options)
    try:
        return load_backbone(concept.meta.backbone.name, **options)
    except ValueError as error:
        raise ValueError(
            f"the concept {concept.name!r} was learned on {concept.meta.backbone.name}: {error} "
            "Say where that model is now with --backbone PATH"
        ) from error
