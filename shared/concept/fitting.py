"""Whether a concept fits a model: by the layers that it touches and their shapes, not by the whole architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.concept_folder import Concept
from shared.trainable.delta import find_parameter

Shapes = dict[str, dict[str, tuple[int, ...]]]  # component -> layer or parameter -> shape of the base weight


def fits(concept: Concept, backbone: Backbone) -> str | None:
    """None when the concept can be attached to this model, else the reason why not.

    It can where the model reads the concept's family, has every layer that the concept touches in the same shape, and
    token embeddings of the same width in every text encoder for which it learned words.
    """
    meta, info = concept.meta, concept.meta.backbone
    if info.family != backbone.family and info.family not in backbone.reads:
        reads = ", ".join(sorted({backbone.family, *backbone.reads}))
        return (
            f"it was learned on {info.family} ({info.name}), and this backbone is {backbone.family} "
            f"({backbone.name}), which reads concepts of {reads}"
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
            return f"its words have {width} values in {component}, and words here have {model_width}"
    return None


def _compare(component: str, layers: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor | None]) -> str | None:
    gone = [path for path, weight in weights.items() if weight is None and layers[path]]
    if gone:
        return f"{len(gone)} of the {len(layers)} layers of {component} that it changes are not here, such as {gone[0]}"
    for path, weight in weights.items():
        if weight is not None and tuple(weight.shape) != layers[path]:
            return f"its {component}.{path} is {list(layers[path])}, here it is {list(weight.shape)}"
    return None


def base_weight(backbone: Backbone, component: str, path: str) -> Tensor | None:
    """The weight of the layer, or the parameter, that a path names, whatever wraps it now; None where there is none."""
    parameter = find_parameter(backbone, f"{component}.{path}.weight")
    return parameter if parameter is not None else find_parameter(backbone, f"{component}.{path}")


def embedding_width(backbone: Backbone, component: str) -> int:
    """How many values a token's embedding has in this text encoder."""
    return int(backbone.word_embeddings(component, "a").shape[-1])


def shapes(backbone: Backbone, touched: Iterable[tuple[str, str]]) -> Shapes:
    """The base shapes of (component, path) pairs; () for a layer that keeps its weight in a form of its own."""
    out: Shapes = {}
    for component, path in sorted(set(touched)):
        weight = base_weight(backbone, component, path)
        out.setdefault(component, {})[path] = () if weight is None else tuple(weight.shape)
    return out
