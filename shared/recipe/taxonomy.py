"""Derives a recipe's place in the taxonomy of the survey (https://arxiv.org/abs/2405.05538) from its slots."""

from __future__ import annotations

from collections.abc import Iterable

from shared.recipe.catalog import Taxonomy
from shared.recipe.phases import expand_phases
from shared.recipe.schema import Recipe

_ROLES = {
    frozenset({"self_attention", "cross_attention"}): "attention",
    frozenset({"cross_attention.kv"}): "cross-attention K/V",
}


def taxonomy_of(recipe: Recipe) -> Taxonomy:
    """Returns the recipe's own `taxonomy`, with its empty fields filled in from the slots of all phases."""
    phases = [phase for _, phase in expand_phases(recipe)]
    derived = {
        "modifier": recipe.modifier.taxonomy,
        "trains": ", then ".join(_once(trained for phase in phases if (trained := _trains(phase)))),
        "prompt_engineering": _joined(phase.prompts.taxonomy for phase in phases),
        "attention": _joined(_attending(phase) for phase in phases),
        "mask": _joined(_masks(phase) for phase in phases),
        "augmentation": _joined(part.taxonomy for phase in phases for part in phase.augment.values()),
        "regularization": _joined(part.taxonomy for phase in phases for part in phase.regularize.values()),
    }
    stated = {key: value for key, value in recipe.taxonomy.model_dump().items() if value or key not in derived}
    return Taxonomy(**{**derived, **stated})


def _trains(phase: Recipe) -> str:
    return " and ".join(_once(part.taxonomy + _on(part.places) for part in phase.trainable.values()))


def _on(roles: Iterable[str]) -> str:
    names = tuple(roles)
    words = _ROLES.get(frozenset(names)) or ", ".join(n.replace("_", " ") for n in names)
    return f" on {words}" if words else ""


def _attending(phase: Recipe) -> str:
    """Describes the parts that change attention, and the penalties that need attention maps."""
    watching = (p for p in phase.regularize.values() if any("attention" in need for need in p.needs))
    return ", ".join(part.taxonomy for part in (*phase.attention.values(), *watching))


def _masks(phase: Recipe) -> str:
    loss = ["masked loss"] if phase.objective.masked else []
    loss = ["loss outside the subject"] if phase.objective.inverts else loss
    return ", ".join([*(part.taxonomy for part in phase.masks.values()), *loss])


def _joined(texts: Iterable[str]) -> str:
    return ", ".join(_once(text for text in texts if text))


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
