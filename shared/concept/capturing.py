"""Captures the words and adapters attached to a backbone as a concept that can be saved."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from typing import Any

from torch import Tensor

from shared.backbones.protocol import Adapter, Backbone
from shared.concept.concept_folder import START, Concept, adapter_id
from shared.concept.fitting import embedding_width, shapes
from shared.concept.layers_identity import layers_identity
from shared.concept.model_locations import remember
from shared.concept.provenance import Provenance, plain, public_name
from shared.concept.schema import ConceptMeta
from shared.concept.shared_adapter import unshared
from shared.config import validate
from shared.io.adapter_settings import recordable
from shared.trainable.adapter import PeftAdapter, config_to_dict
from shared.trainable.branch import BranchAdapter
from shared.trainable.delta import DeltaAdapter

Tensors = dict[str, dict[str, Tensor]]


def capture(
    backbone: Backbone, name: str, provenance: Provenance = Provenance(), adapter_sets: Sequence[str] = ()
) -> Concept:
    """Returns the words and adapters attached under `name` as a concept that can be saved.

    Args:
        adapter_sets: the names under which the adapters are registered; by default, only `name`. A run with several
            subjects or adapter sets uses several names. In the saved concept, one strength applies to all these adapters

    Raises:
        ValueError: if nothing is attached under these names, if an adapter is of a kind that cannot be saved, or if there is
            a placeholder but no modifier is known for it

    Warns:
        UserWarning: if the provenance is invalid. The concept is then returned without its recipe, metrics and references
    """
    attached = [unshared(a) for source in adapter_sets or (name,) for a in backbone.adapters.get(source, [])]
    placeholder = backbone.placeholders.get(name)
    recipe = provenance.settings()
    modifier = _modifier(provenance, recipe) if placeholder is not None or provenance.modifier is not None else {}
    if placeholder is None and not attached:
        raise ValueError(f"nothing is attached under {name!r}, so there is nothing to save")
    if placeholder is not None and not modifier:
        raise ValueError(
            f"{name!r} has a placeholder but no modifier: give the modifier, because the concept cannot be loaded without it"
        )
    adapters_info, tensors = _adapters_of(attached, name)
    if placeholder is not None:
        starts = {START + key: vectors for key, vectors in placeholder.initial_state_dict().items()}
        tensors["embeddings"] = {**placeholder.state_dict(), **starts}
    tensors = {kind: state for kind, state in tensors.items() if state}
    remember(backbone)
    needed = {
        "name": name,
        "kind": provenance.kind,
        "modifier": modifier,
        **adapters_info,
        "attention": recipe.get("attention", {}),
        **_built_on(backbone, adapters_info, placeholder.components if placeholder is not None else ()),
        "adapter_id": adapter_id(tensors),
        "seed": recipe.get("seed", 0) if provenance.seed is None else provenance.seed,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return Concept(_described(needed, provenance), tensors, provenance.preview)


def _built_on(backbone: Backbone, adapters_info: dict[str, Any], encoders: Sequence[str]) -> dict[str, Any]:
    """Describes the model, and the layers and embeddings that the concept needs."""
    layers = shapes(backbone, _touched(adapters_info))
    info = {
        "family": backbone.family,
        "name": public_name(backbone.name),
        "checkpoint": backbone.checkpoint,
        "layers": layers_identity(backbone, layers, encoders),
    }
    return {"backbone": info, "layers": layers, "embeddings": {c: embedding_width(backbone, c) for c in encoders}}


def _modifier(provenance: Provenance, recipe: dict[str, Any]) -> dict[str, Any]:
    return plain(provenance.modifier) if provenance.modifier is not None else recipe.get("modifier", {})


def _described(needed: dict[str, Any], provenance: Provenance) -> ConceptMeta:
    where = f"the concept {needed['name']!r}"
    described = provenance.described()
    try:
        return validate(ConceptMeta, {**needed, **described}, where)
    except ValueError as error:  # an invalid description must not cost the user the learned tensors
        kept = {"class_noun": described["class_noun"]}
        meta = validate(ConceptMeta, {**needed, **kept}, where)
        warnings.warn(f"{error}\nThe concept is saved without its recipe, metrics and references", stacklevel=3)
        return meta


def _adapters_of(attached: Sequence[Adapter], name: str) -> tuple[dict[str, Any], Tensors]:
    """Returns the description's "adapters", "weights" and "branches" entries, and the tensors by kind.

    If two adapters have the same slot and component, a number is appended to the second one's slot.
    """
    adapters: dict[str, dict[str, Any]] = {}
    weights: dict[str, dict[str, list[str]]] = {}
    branches: dict[str, dict[str, Any]] = {}
    tensors: Tensors = {"adapter": {}, "weights": {}, "branches": {}}
    for adapter in attached:
        if isinstance(adapter, PeftAdapter):
            slot = _free(adapter.slot, [s for s, parts in adapters.items() if adapter.component in parts])
            settings = recordable(config_to_dict(adapter.config), adapter.modules(), adapter.seed, adapter.min_rank)
            adapters.setdefault(slot, {})[adapter.component] = settings
            tensors["adapter"].update({f"{slot}.{k}": v for k, v in adapter.state_dict().items()})
        elif isinstance(adapter, DeltaAdapter):
            slot, state = _free(adapter.slot, list(weights)), adapter.state_dict()
            for component, _, path in (key.partition(".") for key in sorted(state)):
                weights.setdefault(slot, {}).setdefault(component, []).append(path)
            tensors["weights"].update({f"{slot}.{k}": v for k, v in state.items()})
        elif isinstance(adapter, BranchAdapter):
            slot = _free(adapter.slot, [s for s, parts in branches.items() if adapter.component in parts])
            branches.setdefault(slot, {})[adapter.component] = adapter.settings.model_dump(mode="json")
            tensors["branches"].update({f"{slot}.{k}": v for k, v in adapter.state_dict().items()})
        else:
            raise ValueError(f"{name!r} has a {type(adapter).__name__}, which a concept cannot store")
    return {"adapters": adapters, "weights": weights, "branches": branches}, tensors


def _free(slot: str, taken: Sequence[str]) -> str:
    name, number = slot, 2
    while name in taken:
        name, number = f"{slot}_{number}", number + 1
    return name


def _touched(adapters_info: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Yields the (component, path) of every layer or parameter that the concept touches."""
    for components in adapters_info["adapters"].values():
        yield from ((c, path) for c, settings in components.items() for path in settings["target_modules"])
    for components in adapters_info["weights"].values():
        yield from ((c, path) for c, paths in components.items() for path in paths)
    for components in adapters_info["branches"].values():
        yield from ((c, path) for c, settings in components.items() for path in settings["layers"])
