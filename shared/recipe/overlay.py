"""What a small world changes in every recipe (`configs/overlays/*.yaml`), and what it leaves to the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shared.config import merge, read_yaml
from shared.recipe.catalog import config_folder


def overlay(backbone: str, data: Mapping[str, Any], methods: Sequence[str]) -> dict[str, Any]:
    """What `configs/overlays/toybox.yaml` adapts: steps and rates for the small world, in one place.

    Its `common` part is for every recipe, `by_kind` for recipes (and phases) that have a part of that kind, `recipes`
    for the shipped ones of these names (`methods`, a base first).
    """
    file = config_folder() / "overlays" / "toybox.yaml"
    if backbone != "toybox" or not file.is_file():
        return {}
    rules = read_yaml(file)
    out = merge(merge({}, rules.get("common", {})), _by_kind(rules, data))
    for name, phase in mapping(data.get("phases")).items():
        if phase is not None:
            out = merge(out, {"phases": {name: _by_kind(rules, mapping(phase))}})
    for method in methods:
        out = merge(out, rules.get("recipes", {}).get(method, {}))
    return out


def _by_kind(rules: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for slot, by_kind in rules.get("by_kind", {}).items():
        for key, part in mapping(data.get(slot)).items():
            kind = part.get("kind", key) if isinstance(part, Mapping) else None
            if kind in by_kind:
                out = merge(out, {slot: {key: {"kind": kind, **by_kind[kind]}}})
    return out


def unsaid(
    rules: Mapping[str, Any], said: Sequence[Mapping[str, Any]], full: Mapping[str, Any], kinds: Mapping[str, Any]
) -> dict[str, Any]:
    """The rules without what the user said: a rule gives way to a value that still holds in `full`, the whole recipe.

    What was said outside the phases counts in them too.
    """
    top = [{k: v for k, v in layer.items() if k != "phases"} for layer in said]
    base = {k: v for k, v in full.items() if k != "phases"}
    out = _unsaid({k: v for k, v in rules.items() if k != "phases"}, top, base)
    phases = mapping(full.get("phases"))
    for name, rule in mapping(rules.get("phases")).items():
        if isinstance(phases.get(name), Mapping):
            own = [mapping(mapping(layer.get("phases")).get(name)) for layer in said]
            whole = merge(base, mapping(phases.get(name)), kinds)
            out = merge(out, {"phases": {name: _unsaid(rule, [*top, *own], whole)}})
    return out


def _unsaid(rules: Mapping[str, Any], said: Sequence[Mapping[str, Any]], full: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, rule in rules.items():
        values = [layer[key] for layer in said if key in layer]
        if isinstance(rule, Mapping) and isinstance(full.get(key, {}), Mapping):
            out[key] = _unsaid(rule, [v for v in values if isinstance(v, Mapping)], mapping(full.get(key)))
        elif not (values and key in full):
            out[key] = rule
    return out


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping as it is; nothing of anything else (what is wrong there, validation says)."""
    return value if isinstance(value, Mapping) else {}
