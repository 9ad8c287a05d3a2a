"""Adapts recipes to a small world, using rules from `configs/overlays/*.yaml`. User settings override these rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared.config import merge, read_yaml, slots
from shared.recipe.catalog import config_folder
from shared.recipe.schema import Recipe


@dataclass(frozen=True)
class Rules:
    """The rules of one overlay file, for the recipes of one modality.

    A file has these sections:

    - `common` applies to every recipe.
    - `by_modality` applies to the recipes of one modality.
    - `by_trained` applies to recipes or phases that train a part of the given kind. If several kinds match, only the
      first one in the file applies. The `alone` section of this kind is used for a recipe without phases, and its
      `phase` section is used for each phase of any other recipe.
    - `by_kind` applies to every part of the given kind (or `kind.type`).
    - `recipes` applies to the shipped recipe with the given name and to recipes that inherit from it.

    Rules never add parts. A rule is skipped if its part is missing from the recipe, or has a different `kind` there.
    """

    file: Mapping[str, Any]
    modality: str
    kinds: Mapping[str, Any]  # default kinds, as for `merge`
    # the slots, in the modality's recipes, whose parts have freely chosen names
    slots: Sequence[str] = slots(Recipe)

    @classmethod
    def read(cls, name: str | None, modality: str, kinds: Mapping[str, Any], model: type[Recipe] = Recipe) -> Rules:
        """Reads `configs/overlays/NAME-MODALITY.yaml`, or else `NAME.yaml`. Without a name or a file, there are no rules."""
        folder = config_folder() / "overlays"
        path = folder / f"{name}-{modality}.yaml"
        path = path if path.is_file() else folder / f"{name}.yaml"
        return cls(read_yaml(path) if name and path.is_file() else {}, modality, kinds, slots(model))

    def of(self, data: Mapping[str, Any], methods: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the changes that the rules make to the recipe `data`.

        Args:
            methods: the names of the shipped recipes among `data` and the recipes it inherits from, root first
        """
        phases = mapping(data.get("phases"))
        out = merge(self.file.get("common", {}), mapping(self.file.get("by_modality", {}).get(self.modality)))
        if not phases:
            out = merge(out, self._by_trained(data, "alone"))
        out = merge(out, self._by_kind(data))
        base = {key: value for key, value in data.items() if key != "phases"}
        for name, phase in phases.items():
            trained = self._by_trained(merge(base, mapping(phase), self.kinds), "phase")
            out = merge(out, {"phases": {name: merge(trained, self._by_kind(mapping(phase)))}})
        for method in methods:
            out = merge(out, _for_parts_of(data, mapping(mapping(self.file.get("recipes")).get(method)), self.slots))
        return out

    def _by_kind(self, data: Mapping[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for slot, rules in self.file.get("by_kind", {}).items():
            for key, part in mapping(data.get(slot)).items():
                if isinstance(part, Mapping):
                    kind = str(part.get("kind", key))
                    for name in (kind, f"{kind}.{part.get('type')}"):
                        if name in rules:
                            out = merge(out, {slot: {key: {"kind": kind, **rules[name]}}})
        return out

    def _by_trained(self, data: Mapping[str, Any], place: str) -> Mapping[str, Any]:
        task = data.get("task", "tune")
        if (task.get("kind", "tune") if isinstance(task, Mapping) else task) != "tune":
            return {}
        parts = mapping(data.get("trainable"))
        kinds = {part.get("kind", key) for key, part in parts.items() if isinstance(part, Mapping)}
        matching = (rules for kind, rules in self.file.get("by_trained", {}).items() if kind in kinds)
        return mapping(next(matching, {}).get(place))


def _for_parts_of(data: Mapping[str, Any], rule: Mapping[str, Any], slots: Sequence[str]) -> dict[str, Any]:
    """Returns a rule minus its settings for parts that are missing from the recipe or phase, or that have a different
    kind there."""
    out = {key: part for key, part in rule.items() if not _of_another_kind(part, data.get(key))}
    for slot in slots:
        if isinstance(rule.get(slot), Mapping):
            there = mapping(data.get(slot))
            out[slot] = {
                name: part
                for name, part in rule[slot].items()
                if isinstance(there.get(name), Mapping)
                and mapping(part).get("kind") in (None, there[name].get("kind", name))
            }
    phases = mapping(data.get("phases"))
    if "phases" in rule:
        out["phases"] = {
            name: _for_parts_of(mapping(phases[name]), phase, slots)
            for name, phase in rule["phases"].items()
            if name in phases
        }
    return out


def _of_another_kind(rule: Any, part: Any) -> bool:
    said = mapping(rule).get("kind")
    return said is not None and said != mapping(part).get("kind", said)


def unstated(
    rules: Mapping[str, Any], stated: Sequence[Mapping[str, Any]], full: Mapping[str, Any], kinds: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the rules for keys that the user did not set. A value that the user set takes precedence over a rule, as
    long as the combined recipe `full` still has the key.

    Values that the user set outside the phases also take precedence inside them.
    """
    top = [{k: v for k, v in layer.items() if k != "phases"} for layer in stated]
    base = {k: v for k, v in full.items() if k != "phases"}
    out = _unstated({k: v for k, v in rules.items() if k != "phases"}, top, base)
    phases = mapping(full.get("phases"))
    for name, rule in mapping(rules.get("phases")).items():
        if name in phases and isinstance(phases[name], Mapping | None):
            in_phase = [mapping(mapping(layer.get("phases")).get(name)) for layer in stated]
            whole = merge(base, mapping(phases.get(name)), kinds)
            out = merge(out, {"phases": {name: _unstated(rule, [*top, *in_phase], whole)}})
    return out


def _unstated(rules: Mapping[str, Any], stated: Sequence[Mapping[str, Any]], full: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, rule in rules.items():
        values = [layer[key] for layer in stated if key in layer]
        if isinstance(rule, Mapping) and isinstance(full.get(key, {}), Mapping):
            out[key] = _unstated(rule, [v for v in values if isinstance(v, Mapping)], mapping(full.get(key)))
        elif not (values and key in full):
            out[key] = rule
    return out


def mapping(value: Any) -> Mapping[str, Any]:
    """Returns the value if it is a mapping, or else an empty mapping. Validation reports wrong types later."""
    return value if isinstance(value, Mapping) else {}
