"""Finds a recipe, and combines its files with the backbone's overlay and the user's overrides, in every phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from shared.backbones.load import WORLDS
from shared.config import default_kinds, merge, slots, unknown, validate
from shared.recipe.catalog import find
from shared.recipe.inherit import Layer, read_layers
from shared.recipe.overlay import Rules, mapping, unstated
from shared.recipe.overrides import parse_overrides
from shared.recipe.phases import check_phases, expand_phases
from shared.recipe.schema import Recipe

R = TypeVar("R", bound=Recipe)
#: The group of entry points of the form `modality = "module:class"`. Each class is a `Recipe` with its package's parts.
GROUP = "pcs.recipes"


def model_of(modality: str) -> type[Recipe]:
    """Returns the recipe class of a modality, which an installed package provides. For "image", the core's class is used
    if no package provides one.

    Raises ValueError if no installed package provides this modality.
    """
    from importlib.metadata import entry_points

    offered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if modality not in ("image", *offered):
        raise ValueError(unknown(modality, ["image", *offered], "modality"))
    return offered[modality].load() if modality in offered else Recipe


def load(
    recipe: str,
    overrides: Sequence[str] = (),
    modality: str = "image",
    model: type[R] = Recipe,
    backbone: str | Path | None = None,
) -> R:
    """Resolves a recipe.

    These layers are combined, from lowest to highest priority: the shipped files (each after its `base`), the toybox's
    overlay (only if the backbone is the toybox), the user's own files, and the user's `key=value` settings. The overlay
    adapts the parts that the combined recipe has.

    backbone: the model to use if no layer names one, for example the model of the concepts in use

    Raises ValueError for an unknown recipe, a broken file, or an invalid key or value.
    """
    layers = read_layers(find(recipe, modality), modality)
    changes = parse_overrides(overrides, model)
    files = _inherited(layers, model)
    check_phases(changes, files)
    full = _lay(files, changes, model)
    if backbone is not None:
        full.setdefault("backbone", str(backbone))
    world = WORLDS.get(str(full.get("backbone", model.model_fields["backbone"].default)))
    shipped = [layer.name for layer in layers if layer.shipped]
    rules = Rules.read(world and world.overlay, modality, default_kinds(model), model).of(full, shipped)
    stated = [*(layer.data for layer in layers if not layer.shipped), changes]
    try:
        resolved = validate(model, merge(full, unstated(rules, stated, full, _kinds(model)), _kinds(model)))
        for _ in expand_phases(resolved):  # report a wrong key inside a phase now, not in the middle of the run
            pass
    except ValueError as error:
        raise ValueError(_blamed(str(error), layers, model)) from None
    return resolved


def written(recipe: str, modality: str = "image", model: type[R] = Recipe) -> R:
    """Returns the recipe as its files define it for full-size models, without an overlay. Raises ValueError in the same
    cases as `load`."""
    layers = read_layers(find(recipe, modality), modality)
    return validate(model, _inherited(layers, model), where=layers[-1].path.name)


def _inherited(layers: Sequence[Layer], model: type[Recipe]) -> dict[str, Any]:
    """Combines the files. Each file overrides its base and the base's phases, just as the command line overrides a
    file."""
    data = dict(layers[0].data)
    for layer in layers[1:]:
        check_phases(layer.data, data, layer.path.name)
        data = _lay({k: v for k, v in data.items() if k != "method"}, layer.data, model)
    return {"method": layers[-1].name, **data}


def _blamed(message: str, layers: Sequence[Layer], model: type[Recipe]) -> str:
    """Prefixes each line of a message with the name of the first file in the chain that has this error. Lines that no
    file accounts for come from the command line and stay unchanged.
    """
    heads: dict[str, str] = {}
    for i, layer in enumerate(layers):
        try:
            for _ in expand_phases(validate(model, _inherited(layers[: i + 1], model))):
                pass
        except ValueError as error:
            for line in str(error).splitlines():
                heads.setdefault(line, layer.path.name)
    return "\n".join(f"{heads[line]}: {line}" if line in heads else line for line in message.splitlines())


def _kinds(model: type[Recipe]) -> dict[str, Any]:
    kinds = default_kinds(model)
    return {**kinds, "phases": {"*": kinds}}


def _lay(data: Mapping[str, Any], changes: Mapping[str, Any], model: type[Recipe]) -> dict[str, Any]:
    """Applies the changes of a higher layer to the settings and phases in `data`. Parts that the changes add are kept
    alongside the existing parts."""
    filled = {slot: model.model_fields[slot].default for slot in slots(model)} | dict(data)
    filled, left = _outrank(filled, changes, slots(model), default_kinds(model))
    gone = [name for name, phase in mapping(changes.get("phases")).items() if phase is None]
    out = merge(filled, left, _kinds(model))
    if gone:
        out["phases"] = {name: phase for name, phase in out["phases"].items() if name not in gone}
    return out


def _outrank(
    data: Mapping[str, Any], changes: Mapping[str, Any], parts: Sequence[str], kinds: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Applies the changes inside the phases, which would otherwise override them. Returns the data with changed phases,
    and the changes that remain to be applied outside the phases.

    A part that exists only in phases is changed only there. A part that a phase has dropped stays dropped there.
    """
    kept = data.get("phases") if changes.get("phases", {}) is not None else None
    phases = {name: dict(phase) for name, phase in mapping(kept).items() if isinstance(phase, Mapping)}
    left = dict(changes)
    for key in changes.keys() - {"phases"}:
        if key not in parts or not isinstance(changes[key], Mapping):
            for phase in [p for p in phases.values() if key in p]:
                one = (
                    isinstance(kinds.get(key), str)
                    and isinstance(phase[key], Mapping)
                    and isinstance(changes[key], Mapping)
                )
                phase[key] = (
                    merge(phase, {key: changes[key]}, kinds)[key] if one else _replaced(phase[key], changes[key])
                )
            continue
        for name, part in changes[key].items():
            having = [p for p in phases.values() if mapping(p.get(key)).get(name) is not None]
            for phase in having:
                phase[key] = merge(phase[key], {name: part})
            if having and name not in mapping(data.get(key)):
                left[key] = {n: p for n, p in left[key].items() if n != name}
    return ({**data, "phases": {**data["phases"], **phases}} if phases else dict(data)), left


def _replaced(phase: Any, change: Any) -> Any:
    """Returns `phase` with its values replaced by those that `change` has for the same keys."""
    if not isinstance(phase, Mapping) or not isinstance(change, Mapping):
        return change
    return {k: _replaced(v, change[k]) if k in change else v for k, v in phase.items()}
