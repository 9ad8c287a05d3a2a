"""Attaches saved concepts to a backbone."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

from pydantic import create_model
from torch import Tensor

from shared.backbones.protocol import Adapter, Backbone, Placeholder
from shared.concept.concept_folder import Concept
from shared.concept.confusable import confusable
from shared.concept.fitting import fits
from shared.concept.layers_identity import layers_identity
from shared.concept.shared_adapter import SharedAdapter, unshared
from shared.config import MOST_STRENGTH, Part, validate
from shared.io.adapter_settings import MIN_RANK, OWN, SEED
from shared.modifiers import Modifier, PlainText
from shared.trainable.adapter import PeftAdapter, config_from_dict
from shared.trainable.branch import BranchAdapter
from shared.trainable.delta import DeltaAdapter

#: Whether each attached placeholder belongs to a style that consists of ordinary words.
_acts_unnamed: weakref.WeakKeyDictionary[Placeholder, bool] = weakref.WeakKeyDictionary()
_ids: weakref.WeakKeyDictionary[Adapter, str] = weakref.WeakKeyDictionary()  # the adapter_id of each attached adapter


def attach(concept: Concept, backbone: Backbone, strength: float = 1.0, modifiers: Any = Modifier) -> None:
    """Registers the concept's name on the backbone and injects its frozen adapters. `backbone.remove` undoes this.

    Args:
        strength: the strength of the adapters and learned words. 1 is as learned. At 0, adapters are off and words take
            their initial values
        modifiers: the union type of all known modifiers; a package with more modifiers passes its own

    Raises:
        ValueError: if the model lacks a layer that the concept changes, or if that layer has another shape (see `fits`);
            if some of the concept's tensors are missing or invalid; if the concept's name is taken; if the model cannot
            tell the concept's words from those of an attached concept; if the strength is not 1 but there is nothing to
            scale; or if the concept shares its adapters with a concept that is attached at a different strength. The
            backbone is then left unchanged.

    Warns:
        UserWarning: if the concept was learned on a checkpoint with different weights
    """
    name = concept.meta.name
    if name in backbone.placeholders or name in backbone.adapters:
        raise ValueError(
            f"a concept named {name!r} is already attached: remove it first, or save this one under another name"
        )
    if not abs(strength) <= MOST_STRENGTH:
        raise ValueError(
            f"the strength of {name!r} must be between -{MOST_STRENGTH} and {MOST_STRENGTH}, not {strength}"
        )
    _check_fit(concept, backbone)
    twin = _twin(concept, backbone, strength)
    try:
        _attach_placeholder(concept, backbone, modifiers)
        if twin is not None:
            _share(backbone, twin, name)
        else:
            _attach_adapters(concept, backbone)
        backbone.keep_attending(name, *(e for part in concept.meta.attention.values() for e in part.edits(backbone)))
        if strength != 1 or name in backbone.adapters:
            backbone.set_strength(name, strength)  # persists, unlike `active`
    except BaseException:
        if name in backbone.placeholders or name in backbone.adapters:
            backbone.remove(name)
        raise


def detach(backbone: Backbone, name: str) -> None:
    """Removes a concept and restores the model's outputs, repr and tokenizers.

    Raises ValueError if the concept is not attached.
    """
    backbone.remove(name)


def _check_fit(concept: Concept, backbone: Backbone) -> None:
    meta, info = concept.meta, concept.meta.backbone
    reason = fits(concept, backbone)
    if reason:
        raise ValueError(f"{meta.name!r} does not fit {backbone.name or backbone.family}: {reason}")
    if info.family == backbone.family:
        same = info.checkpoint == backbone.checkpoint
    else:  # a family built on another has more weights, so compare only the layers that the concept touches
        same = info.layers == layers_identity(backbone, meta.layers, meta.embeddings)
    if not same:
        warnings.warn(
            f"{meta.name!r} was learned on a checkpoint with different weights ({info.name}; "
            f"this is {backbone.name}): its pictures may look different here",
            stacklevel=3,
        )


def _attach_placeholder(concept: Concept, backbone: Backbone, modifiers: Any) -> None:
    meta = concept.meta
    if not meta.modifier:
        if concept.of("embeddings"):
            raise ValueError(f"{meta.name!r} has token embeddings but no modifier that they belong to")
        return
    named: Any = create_model("Named", __base__=Part, modifier=(modifiers, ...))
    modifier = validate(named, {"modifier": meta.modifier}, where=f"the concept {meta.name!r}").modifier
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="modifier.token=")  # the user was warned during training
        placeholder = modifier.attach(backbone, meta.name, meta.class_noun, seed=meta.seed)
    placeholder.load_state_dict(concept.learned_words)
    if concept.initial_embeddings:  # otherwise the initial values come from this model's words
        placeholder.load_initial_state_dict(concept.initial_embeddings)
    placeholder.frozen = True
    _acts_unnamed[placeholder] = meta.kind == "style" and isinstance(modifier, PlainText)
    _check_words(placeholder, backbone)


def _check_words(placeholder: Placeholder, backbone: Backbone) -> None:
    """Raises ValueError if the placeholder's words equal, contain or are contained in those of another attached concept.

    Two styles that consist of ordinary words may share them, because such styles take effect without being named.
    """
    for name, other in backbone.placeholders.items():
        if other is placeholder or (_acts_unnamed.get(other) and _acts_unnamed[placeholder]):
            continue
        if confusable(backbone, placeholder, other):
            raise ValueError(
                f"{placeholder.name!r} and {name!r} cannot be loaded together: prompts call them "
                f"{placeholder.words!r} and {other.words!r}, which the model cannot tell apart. Load only one of them, or "
                "learn one of them again with another modifier.token or with modifier.kind=learnable_token"
            )


def _attach_adapters(concept: Concept, backbone: Backbone) -> None:
    meta, left = concept.meta, dict(concept.of("adapter"))
    total = len(left)
    for slot, components in meta.adapters.items():
        for component, settings in components.items():
            prefix = f"{slot}.{component}."
            state = {k[len(slot) + 1 :]: left.pop(k) for k in list(left) if k.startswith(prefix)}
            _check_size(settings, state, f"{slot}.{component}")
            config = config_from_dict({k: v for k, v in settings.items() if k not in OWN})
            seed = settings.get(SEED, 0)
            adapter = PeftAdapter.inject(backbone, meta.name, slot, component, config, seed)
            if MIN_RANK in settings:
                adapter.let_rank_fall(backbone, settings[MIN_RANK])
            adapter.load_state_dict(state)
            adapter.train(False)
            _ids[adapter] = meta.adapter_id
    if left:
        raise ValueError(
            f"{len(left)} of {total} adapter tensors of {meta.name!r} belong to no adapter, "
            f"for example {next(iter(left))!r}"
        )
    _attach_weights(concept, backbone)
    _attach_branches(concept, backbone)


def _attach_branches(concept: Concept, backbone: Backbone) -> None:
    meta, left = concept.meta, dict(concept.of("branches"))
    for slot, components in meta.branches.items():
        for component, settings in components.items():
            tensors: dict[str, dict[str, Tensor]] = {}
            for first in settings.layers:
                prefix = f"{slot}.{component}.{first}."
                tensors[first] = {k[len(prefix) :]: left.pop(k) for k in list(left) if k.startswith(prefix)}
            adapter = BranchAdapter.inject(backbone, meta.name, slot, component, settings.form, tensors)
            _ids[adapter] = meta.adapter_id
    if left:
        raise ValueError(
            f"{len(left)} branch tensors of {meta.name!r} belong to no branch, for example {next(iter(left))!r}"
        )


def _attach_weights(concept: Concept, backbone: Backbone) -> None:
    meta, left = concept.meta, dict(concept.of("weights"))
    for slot, components in meta.weights.items():
        keys = [f"{component}.{path}" for component, paths in components.items() for path in paths]
        missing = [k for k in keys if f"{slot}.{k}" not in left]
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(keys)} changed weights of {meta.name!r} have no tensor, "
                f"for example {slot}.{missing[0]!r}"
            )
        deltas = {k: left.pop(f"{slot}.{k}") for k in keys}
        _ids[DeltaAdapter.inject(backbone, meta.name, slot, deltas)] = meta.adapter_id
    if left:
        raise ValueError(
            f"{len(left)} changed weights of {meta.name!r} belong to no slot, for example {next(iter(left))!r}"
        )


def _check_size(settings: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """Raises ValueError, before any memory is allocated, if the adapter would be larger than its stored tensors."""
    plain = settings.get("peft_type") == "LORA"
    ranks = [settings.get("r", 8), *(settings.get("rank_pattern") or {}).values()] if plain else [0]
    largest = max((max(t.shape, default=0) for t in state.values()), default=0)
    if not state:
        raise ValueError(f"{where}: no tensors for an adapter on {len(settings['target_modules'])} modules")
    if max(ranks) > largest:
        raise ValueError(
            f"{where}: rank {max(ranks)} is too large for its {len(state)} tensors, whose largest dimension "
            f"is {largest}"
        )


# --- concepts that were learned together ------------------------------------------------------


def _twin(concept: Concept, backbone: Backbone, strength: float) -> str | None:
    """Returns the name of the attached concept with the same adapters, if any. Raises ValueError if that concept
    has a different strength."""
    meta = concept.meta
    if not meta.adapter_id:
        return None
    for other, adapters in backbone.adapters.items():
        if adapters and all(_ids.get(unshared(a)) == meta.adapter_id for a in adapters):
            current = backbone.strengths[other]
            if current != strength:
                raise ValueError(
                    f"{meta.name!r} and {other!r} were learned together and share one adapter: "
                    f"give both the same strength ({other!r} has {current:g}, but {strength:g} was given for "
                    f"{meta.name!r})"
                )
            return other
    return None


def _share(backbone: Backbone, other: str, name: str) -> None:
    strength = backbone.strengths[other]
    shares = [
        a if isinstance(a, SharedAdapter) else SharedAdapter(a, other, {other: strength})
        for a in backbone.adapters[other]
    ]
    backbone.adapters[other] = list(shares)
    for share in shares:
        backbone.add_adapter(name, share.share(name))
