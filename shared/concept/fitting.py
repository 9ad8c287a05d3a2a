"""Checks whether a concept fits a model, by comparing the shapes of the layers that the concept touches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.concept_folder import Concept
from shared.trainable.delta import find_parameter

Shapes = dict[str, dict[str, tuple[int, ...]]]  # component -> layer or parameter -> shape of the base weight


def fits(concept: Concept, backbone: Backbone) -> str | None:
    """Returns None if the concept can be attached to this model, and otherwise the reason why it cannot.

    The model must support the concept's family. Every layer that the concept touches must exist in the model with the
    recorded shape. In every text encoder for which the concept learned words, the token embeddings must have the
    recorded width.
    """
    meta, info = concept.meta, concept.meta.backbone
    if info.family != backbone.family and info.family not in backbone.reads:
        reads = ", ".join(sorted({backbone.family, *backbone.reads}))
        return (
            f"it was learned on {info.family} ({info.name}), but this backbone is {backbone.family} "
            f"({backbone.name}), which can load concepts learned on {reads}"
        )
    texts = {c for c in backbone.components if c.startswith("text_encoder")}
    missing = sorted({*meta.layers} - set(backbone.components)) + sorted({*meta.embeddings} - texts)
    if missing:
        return f"it needs {', '.join(missing)}; this backbone has {', '.join(backbone.components)}"
    for component, layers in meta.layers.items():
        reason = _compare(component, layers, {p: base_weight(backbone, component, p) for p in layers})
        if reason:
            return reason
    for component, width in meta.embeddings.items():
        model_width = embedding_width(backbone, component)
        if model_width != width:
            return f"its word embeddings have {width} values in {component}, but this model's have {model_width}"
    return None


def _compare(component: str, layers: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor | None]) -> str | None:
    gone = [path for path, weight in weights.items() if weight is None and layers[path]]
    if gone:
        some = f"{len(gone)} of the {len(layers)} layers of {component}"
        return f"{some} that it changes do not exist here (for example, {gone[0]})"
    for path, weight in weights.items():
        if weight is not None and tuple(weight.shape) != layers[path]:
            return f"its {component}.{path} has shape {list(layers[path])}, but here the shape is {list(weight.shape)}"
    return None


def base_weight(backbone: Backbone, component: str, path: str) -> Tensor | None:
    """Returns the layer's weight or the parameter at a path, even if an adapter wraps the layer. Returns None if there
    is neither."""
    parameter = find_parameter(backbone, f"{component}.{path}.weight")
    return parameter if parameter is not None else find_parameter(backbone, f"{component}.{path}")


def embedding_width(backbone: Backbone, component: str) -> int:
    """Returns the width of a token embedding in this text encoder."""
    return int(backbone.word_embeddings(component, "a").shape[-1])


def shapes(backbone: Backbone, touched: Iterable[tuple[str, str]]) -> Shapes:
    """Returns the shapes of the base weights at (component, path) pairs. A layer without an ordinary weight, such as
    one with packed weights, has the shape ()."""
    out: Shapes = {}
    for component, path in sorted(set(touched)):
        weight = base_weight(backbone, component, path)
        out.setdefault(component, {})[path] = () if weight is None else tuple(weight.shape)
    return out
