"""What is attached to a backbone, as a concept that can be saved."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared.backbones.load import TOYBOX
from shared.backbones.protocol import Adapter, Backbone
from shared.concept.concept_folder import START, Concept, adapter_id
from shared.concept.schema import BackboneInfo, ConceptMeta, Kind
from shared.concept.shared_adapter import unshared
from shared.config import Part, validate
from shared.io.files import sha256
from shared.io.terminal import escaped_name
from shared.trainable.adapter import PeftAdapter, config_to_dict
from shared.trainable.delta import DeltaAdapter

_ABSOLUTE = re.compile(r"^([/~\\]|[A-Za-z]:[/\\])")


def capture(
    backbone: Backbone,
    name: str,
    *,
    kind: Kind = "subject",
    class_noun: str = "",
    modifier: Part | Mapping[str, Any] | None = None,
    adapters_of: str | None = None,
    recipe: Part | Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    references: Iterable[Path | Mapping[str, str]] = (),
    seed: int | None = None,
    ports: Iterable[str] = (),
    preview: Path | None = None,
) -> Concept:
    """What is attached under `name`, as a concept that can be saved.

    Args:
        modifier: the part that named it; the recipe's where it is not given
        adapters_of: the name that the adapters are registered under, where it is not `name` (several subjects in a run)
        recipe: resolved; folders in the user's paths are left out, for a concept is made to be given away
        references: the pictures' files, or {"file": name without folders, "sha256": …} of each
        seed: the recipe's where it is not given

    Raises:
        ValueError: when nothing is attached under these names, or an adapter is of a kind that cannot be saved
    """
    source = adapters_of or name
    plain = _plain(recipe)
    attached = [unshared(a) for a in backbone.adapters.get(source, [])]
    placeholder = backbone.placeholders.get(name)
    part = _plain(modifier) if modifier is not None else plain.get("modifier", {}) if placeholder is not None else {}
    if placeholder is None and not attached:
        raise ValueError(f"nothing is attached under {name!r}: there is nothing to save")
    if placeholder is not None and not part:
        raise ValueError(f"{name!r} has a naming: say which modifier made it, or it cannot be loaded again")
    settings, tensors = _adapters_of(attached, source)
    if placeholder is not None:
        starts = {START + key: rows for key, rows in placeholder.initial_state_dict().items()}
        tensors["embeddings"] = {**placeholder.state_dict(), **starts}
    tensors = {kind: state for kind, state in tensors.items() if state}
    meta = {
        "name": name,
        "kind": kind,
        "class_noun": class_noun,
        "modifier": part,
        "backbone": _info(backbone),
        "adapters": settings,
        "weights": _weights_of(attached),
        "adapter_id": adapter_id(tensors),
        "requires": sorted(
            {c for parts in settings.values() for c in parts} | {*(placeholder.components if placeholder else ())}
        ),
        "recipe": _portable(plain),
        "ports": tuple(ports),
        "metrics": dict(metrics or {}),
        "references": tuple(_reference(r) for r in references),
        "seed": plain.get("seed", 0) if seed is None else seed,
        "versions": _versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return Concept(meta=validate(ConceptMeta, meta, where=f"the concept {name!r}"), tensors=tensors, preview=preview)


def _info(backbone: Backbone) -> BackboneInfo:
    return BackboneInfo(
        family=backbone.family,
        name=backbone.name,
        fingerprint=backbone.fingerprint,
        checkpoint=backbone.checkpoint,
        parts=describe_parts(backbone),
    )


def _adapters_of(
    attached: Iterable[Adapter], name: str
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Tensor]]]:
    settings: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Tensor]] = {"adapter": {}, "weights": {}}
    for adapter in attached:
        if isinstance(adapter, DeltaAdapter):
            tensors["weights"].update({f"{adapter.slot}.{k}": v for k, v in adapter.state_dict().items()})
        elif isinstance(adapter, PeftAdapter):
            config = config_to_dict(adapter.config)
            config["target_modules"] = adapter.modules()  # peft shortens the list
            settings.setdefault(adapter.slot, {})[adapter.component] = config
            tensors["adapter"].update({f"{adapter.slot}.{k}": v for k, v in adapter.state_dict().items()})
        else:
            raise ValueError(f"{name!r} has a {type(adapter).__name__}, which a concept cannot hold")
    return settings, tensors


def _weights_of(attached: Iterable[Adapter]) -> dict[str, dict[str, list[str]]]:
    """slot -> component -> paths of the parameters that are changed."""
    out: dict[str, dict[str, list[str]]] = {}
    for adapter in attached:
        if isinstance(adapter, DeltaAdapter):
            for key in sorted(adapter.deltas):
                component, _, path = key.partition(".")
                out.setdefault(adapter.slot, {}).setdefault(component, []).append(path)
    return out


def _plain(part: Part | Mapping[str, Any] | None) -> dict[str, Any]:
    return part.model_dump(mode="json", by_alias=True) if isinstance(part, Part) else dict(part or {})


def _reference(picture: Path | Mapping[str, str]) -> dict[str, str]:
    return (
        dict(picture)
        if isinstance(picture, Mapping)
        else {"file": escaped_name(picture.name), "sha256": sha256(picture)}
    )


def _portable(value: Any) -> Any:
    """A recipe without the folders of its author's machine; the backbone's stays, in full, for it must be found again."""
    if isinstance(value, Mapping):
        return {str(k): _found(v) if k == "backbone" else _portable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_portable(v) for v in value]
    if isinstance(value, Path) or (isinstance(value, str) and _ABSOLUTE.match(value)):
        return re.split(r"[/\\]", str(value).rstrip("/\\"))[-1]
    return value


def _found(backbone: Any) -> Any:
    """The whole path of a model that is a folder or file here; anything else (toybox, a hub id) as it is."""
    if isinstance(backbone, str) and backbone != TOYBOX and Path(backbone).expanduser().exists():
        return str(Path(backbone).expanduser().resolve())
    return backbone


def _versions() -> dict[str, str]:
    out = {}
    for package in ("torch", "diffusers", "transformers", "peft", "safetensors"):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out


def describe_parts(backbone: Backbone) -> dict[str, str]:
    """Component -> class and number of parameters of the bare network."""
    out = {}
    for component, module in backbone.components.items():
        own = sum(p.numel() for a in _all(backbone) for p in _inside(a, component))
        total = sum(p.numel() for p in module.parameters()) - own
        out[component] = f"{type(module).__name__} with {total:,} parameters"
    return out


def _all(backbone: Backbone) -> list[Adapter]:
    found = {id(a): a for adapters in backbone.adapters.values() for a in map(unshared, adapters)}
    return list(found.values())


def _inside(adapter: Adapter, component: str) -> Iterable[nn.Parameter]:
    return adapter.parameters() if isinstance(adapter, PeftAdapter) and adapter.component == component else ()
