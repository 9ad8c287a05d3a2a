"""Finding recipes and resolving them: file, overlay for the backbone, overrides, phases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from shared.config import default_kinds, merge, read_yaml, slots, validate
from shared.recipe.catalog import config_folder, find, recipe_files
from shared.recipe.overrides import parse_overrides
from shared.recipe.schema import Recipe

R = TypeVar("R", bound=Recipe)
#: What a run has once: a phase cannot change it.
_ONCE = frozenset(
    (
        *("method", "title", "papers", "taxonomy", "kind", "subject", "subjects", "backbone", "output", "name"),
        *("modifier", "preview", "phases"),
    )
)


def overlay(backbone: str, data: Mapping[str, Any], method: str) -> dict[str, Any]:
    """What `configs/overlays/toybox.yaml` adapts: steps and rates for the small world, in one place.

    Its `common` part is for every recipe, `by_kind` for recipes (and phases) that have a part of that kind, `recipes`
    for the shipped one of that name (`method`; "" for none).
    """
    file = config_folder() / "overlays" / "toybox.yaml"
    if backbone != "toybox" or not file.is_file():
        return {}
    rules = read_yaml(file)
    out = merge(merge({}, rules.get("common", {})), _by_kind(rules, data, {}))
    for name, phase in _map(data.get("phases")).items():
        if phase is not None:
            out = merge(out, {"phases": {name: _by_kind(rules, _map(phase), data if not method else {})}})
    return merge(out, rules.get("recipes", {}).get(method, {}))


def _by_kind(rules: Mapping[str, Any], data: Mapping[str, Any], covered: Mapping[str, Any]) -> dict[str, Any]:
    """The rules for the parts of `data`, but for those that `covered` has and that have them from there."""
    out: dict[str, Any] = {}
    for slot, by_kind in rules.get("by_kind", {}).items():
        for key, part in _map(data.get(slot)).items():
            above = _map(_map(covered.get(slot)).get(key))
            kind = part.get("kind", above.get("kind", key)) if isinstance(part, Mapping) else None
            if kind in by_kind and not (above and kind == above.get("kind", key)):
                out = merge(out, {slot: {key: {"kind": kind, **by_kind[kind]}}})
    return out


def load(recipe: str, overrides: Sequence[str] = (), modality: str = "image", model: type[R] = Recipe) -> R:
    """The resolved recipe. Order: a shipped file, the toybox's overlay (on the toybox only), a file of the user's own,
    the user's `key=value`. The overlay adapts the parts that all of these together have.

    Raises ValueError for an unknown recipe, a broken file, or a key or value that no part has.
    """
    path = find(recipe, modality)
    shipped = path.resolve() in {p.resolve() for p in recipe_files(modality).values()}
    data, own = {"method": path.stem, **read_yaml(path)}, parse_overrides(overrides, model)
    full = _lay(data, own, model)
    rules = overlay(str(full.get("backbone", "toybox")), full, path.stem if shipped else "")
    kinds = _kinds(model)
    adapted = merge(full, rules, kinds)
    resolved = validate(model, _lay(adapted, own, model) if shipped else merge(adapted, full, kinds), where=path.name)
    for _ in expand_phases(resolved):  # a wrong key inside a phase is said now, not after an hour
        pass
    return resolved


def _kinds(model: type[Recipe]) -> dict[str, Any]:
    own = default_kinds(model)
    return {**own, "phases": {"*": own}}


def _lay(data: Mapping[str, Any], own: Mapping[str, Any], model: type[Recipe]) -> dict[str, Any]:
    """What the user says laid on a file, and on its phases; a part that the user adds joins those there are."""
    there = {slot: model.model_fields[slot].default for slot in slots(model)} | dict(data)
    there, left = _outrank(there, own, slots(model), default_kinds(model))
    return merge(there, left, _kinds(model))


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
        yield name, validate(type(recipe), merge(base, phase, default_kinds(type(recipe))), where=f"phases.{name}")


def _outrank(
    data: Mapping[str, Any], own: Mapping[str, Any], parts: Sequence[str], kinds: Mapping[str, Any]
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
                one = (
                    isinstance(kinds.get(key), str)
                    and isinstance(phase[key], Mapping)
                    and isinstance(own[key], Mapping)
                )
                phase[key] = merge(phase, {key: own[key]}, kinds)[key] if one else _replaced(phase[key], own[key])
            continue
        for name, part in own[key].items():
            having = [p for p in phases.values() if _map(p.get(key)).get(name) is not None]
            for phase in having:
                phase[key] = merge(phase[key], {name: part})
            if having and name not in _map(data.get(key)):
                left[key] = {n: p for n, p in left[key].items() if n != name}
    return ({**data, "phases": {**data["phases"], **phases}} if phases else dict(data)), left


def _replaced(phase: Any, own: Any) -> Any:
    """`own`, in the keys that `phase` has."""
    if not isinstance(phase, Mapping) or not isinstance(own, Mapping):
        return own
    return {k: _replaced(v, own[k]) if k in own else v for k, v in phase.items()}


def _map(value: Any) -> Mapping[str, Any]:
    """A mapping as it is; nothing of anything else (what is wrong there, validation says)."""
    return value if isinstance(value, Mapping) else {}
