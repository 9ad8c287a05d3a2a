"""Finding recipes and resolving them: file, overlay for the backbone, overrides, phases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from shared.catalog import config_folder, find
from shared.config import merge, parse_overrides, read_yaml, slots, validate
from shared.recipe import Recipe

R = TypeVar("R", bound=Recipe)
#: What a run has once: a phase cannot change it.
_ONCE = frozenset(
    (
        *("method", "title", "papers", "taxonomy", "kind", "subject", "subjects", "backbone", "output", "name"),
        *("modifier", "phases"),
    )
)


def overlay(backbone: str, data: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What `configs/overlays/toybox.yaml` adapts: steps and rates for the small world, in one place.

    Its `common` part goes under every recipe; `by_slot` under recipes that have such a part; `recipes` under one by name.
    """
    file = config_folder() / "overlays" / "toybox.yaml"
    if backbone != "toybox" or not file.is_file():
        return {}
    rules = read_yaml(file)
    out = merge(merge({}, rules.get("common", {})), _by_kind(rules, data))
    for name, phase in _map(data.get("phases")).items():
        out = merge(out, {"phases": {name: _by_kind(rules, _map(phase))}})
    return merge(out, rules.get("recipes", {}).get(method, {}))


def _by_kind(rules: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for slot, by_kind in rules.get("by_kind", {}).items():
        for key, part in _map(data.get(slot)).items():
            kind = part.get("kind", key) if isinstance(part, Mapping) else None
            if kind in by_kind:
                out = merge(out, {slot: {key: by_kind[kind]}})
    return out


def load(recipe: str, overrides: Sequence[str] = (), modality: str = "image", model: type[R] = Recipe) -> R:
    """The resolved recipe. Order: file, the toybox's overlay (on the toybox only), the user's `key=value`.

    Raises ValueError for an unknown recipe, a broken file, or a key or value that no part has.
    """
    path = find(recipe, modality)
    data = read_yaml(path)
    own = parse_overrides(overrides)
    backbone = str(own.get("backbone", data.get("backbone", "toybox")))
    data = merge(data, overlay(backbone, data, path.stem))
    for slot in slots(model):  # a part that the user adds joins those there are
        data.setdefault(slot, model.model_fields[slot].default)
    data, own = _outrank(data, own, slots(model))
    data = merge(merge({"method": path.stem}, data), own)
    resolved = validate(model, data, where=path.name)
    for _ in expand_phases(resolved):  # a wrong key inside a phase is said now, not after an hour
        pass
    return resolved


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data; `validate(type(recipe), dump(recipe))` gives it back."""
    return recipe.model_dump(mode="json", by_alias=True)


def expand_phases(recipe: R) -> Iterator[tuple[str, R]]:
    """(name, recipe) of each phase: the recipe with the phase's overlay laid on; one phase where none are named.

    A part that the recipe has and a phase does not want is set to null in the phase.
    """
    if not recipe.phases:
        yield "tune", recipe
        return
    base = dump(recipe)
    base.pop("phases")
    for name, phase in recipe.phases.items():
        fixed = sorted(_ONCE & phase.keys())
        if fixed:
            raise ValueError(f"phases.{name}.{fixed[0]}: this is the same in all phases; say it outside of them")
        yield name, validate(type(recipe), merge(base, phase), where=f"phases.{name}")


def _outrank(
    data: Mapping[str, Any], own: Mapping[str, Any], parts: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the user says outranks what a phase says: (data with it laid on the phases, what is left for the base).

    A part that only phases have is changed only there; a part that a phase does not want stays away.
    """
    kept = data.get("phases") if own.get("phases", {}) is not None else None
    phases = {name: dict(phase) for name, phase in _map(kept).items() if isinstance(phase, Mapping)}
    left = dict(own)
    for key in own.keys() - {"phases"}:
        if key not in parts or not isinstance(own[key], Mapping):
            for phase in [p for p in phases.values() if key in p]:
                phase[key] = _replaced(phase[key], own[key])
            continue
        for name, part in own[key].items():
            having = [p for p in phases.values() if _map(p.get(key)).get(name) is not None]
            for phase in having:
                phase[key] = merge(phase[key], {name: part})
            if having and name not in _map(data.get(key)):
                left[key] = {n: p for n, p in left[key].items() if n != name}
    changed = merge(data, {"phases": merge(data["phases"], phases)}) if phases else dict(data)
    return changed, left


def _replaced(phase: Any, own: Any) -> Any:
    """`own`, in the keys that `phase` has."""
    if not isinstance(phase, Mapping) or not isinstance(own, Mapping):
        return own
    return {k: _replaced(v, own[k]) if k in own else v for k, v in phase.items()}


def _map(value: Any) -> Mapping[str, Any]:
    """A mapping as it is; nothing of anything else (what is wrong there, validation says)."""
    return value if isinstance(value, Mapping) else {}
