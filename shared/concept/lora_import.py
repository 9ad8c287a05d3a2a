"""Imports a LoRA file from any trainer as a concept that can be attached, scored, saved and exported like any other."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.concept_folder import Concept, adapter_id
from shared.concept.diffusers_format import LORA_FILE
from shared.concept.fitting import base_weight, shapes
from shared.concept.layers_identity import layers_identity
from shared.concept.lora_names import Place, flat, layer_index, looks_like
from shared.concept.lora_tensors import PEFT_FILE, LoraFile, NamedLora, find_file, read_lora_file
from shared.concept.provenance import public_name
from shared.concept.schema import ConceptMeta
from shared.config import NAME, validate
from shared.io.read_subject import plain_noun

# the slot, by whether a layer has DoRA; one peft adapter cannot mix layers with and without DoRA
_SLOT = {False: "lora", True: "dora"}
_SOME = 8  # the maximum number of names listed in a message


@dataclass(frozen=True)
class LayerLora:
    """The low-rank update of one layer of a backbone."""

    down: Tensor  # [r, in, …]
    up: Tensor  # [out, r, …]
    alpha: float  # the scale is alpha / r
    magnitude: Tensor | None = None  # DoRA: one value per output


Layers = dict[tuple[str, str], LayerLora]  # by component and path


def import_lora(path: Path, backbone: Backbone, token: str = "", class_noun: str = "", name: str = "") -> Concept:
    """Imports a LoRA file as a concept for this backbone. The file may use the key names of diffusers, peft or kohya.

    Args:
        path: a safetensors file, or a folder written by diffusers or peft
        token: the subject's words in the training captions ("sks mug"); "" if the LoRA takes effect without a token
        class_noun: the noun for the subject's class; by default, `token` without its first word
        name: the concept's name; by default, it is taken from the file (see `concept_name`)

    Raises:
        ValueError: if the file is not a LoRA (see `read_lora_file`) or was made for another architecture

    Warns:
        UserWarning: if some names in the file match no layer of this backbone and are therefore ignored
    """
    file = read_lora_file(path)
    layers, unmatched = match(file, backbone)
    left = [*unmatched, *file.others]
    if left:
        some = ", ".join(left[:_SOME]) + (f" and {len(left) - _SOME} more" if len(left) > _SOME else "")
        warnings.warn(
            f"{file.path}: names that match no layer of this model are ignored ({len(left)}): {some}",
            stacklevel=2,
        )
    noun = plain_noun(class_noun or token.partition(" ")[2])
    adapters, tensors = _adapters(layers)
    touched = shapes(backbone, layers)
    meta = {
        "name": name or concept_name(file.path),
        "kind": "subject" if token else "style",  # a style takes effect without a token
        "class_noun": noun,
        "modifier": {"kind": "plain_text", "words": token, "with_class_noun": False} if token else {},
        "backbone": {
            "family": backbone.family,
            "name": public_name(backbone.name),
            "checkpoint": backbone.checkpoint,
            "layers": layers_identity(backbone, touched, ()),
        },
        "adapters": adapters,
        "layers": touched,
        "adapter_id": adapter_id({"adapter": tensors}),
        "metrics": {"imported": file.path.name, "names_without_layer": len(left)},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return Concept(validate(ConceptMeta, meta, f"the LoRA {file.path}"), {"adapter": tensors})


def concept_name(path: Path) -> str:
    """Derives a concept's name from the name of a LoRA file, or from the name of its folder if the file has a standard
    name."""
    path = find_file(path)
    stem = path.resolve().parent.name if path.name in (LORA_FILE, PEFT_FILE) else path.stem
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")
    return name if re.match(NAME, name) else "lora"


def match(file: LoraFile, backbone: Backbone) -> tuple[Layers, list[str]]:
    """Returns the backbone layers that the file changes, and the names in the file that match no layer of the backbone.

    Raises ValueError if no name matches, if a name is ambiguous, if shapes do not match this architecture, or if two
    names refer to the same layer.
    """
    index = layer_index(backbone, file.path.name)
    layers: Layers = {}
    by: dict[tuple[str, str], str] = {}
    unmatched, misfits = [], []
    for name, lora in file.layers.items():
        places = index.get(flat(name), set())
        if len(places) > 1:
            where = " and ".join(sorted(f"{p.component}.{p.paths[0]}" for p in places))
            raise ValueError(f"{file.path}: {name!r} is ambiguous: it lacks the prefix that tells {where} apart")
        if not places:
            unmatched.append(name)
            continue
        try:
            parts = _split(lora, next(iter(places)), backbone)
        except _Misfit as misfit:
            misfits.append(str(misfit))
            continue
        for key, part in parts.items():
            if key in layers:
                raise ValueError(f"{file.path} contains {'.'.join(key)} twice, as {by[key]!r} and as {name!r}")
            layers[key], by[key] = part, name
    if misfits or not layers:
        raise ValueError(_another_architecture(file, backbone, len(unmatched), misfits))
    return layers, unmatched


class _Misfit(ValueError):
    """Raised if an update in the file does not have the shape of its layer in the backbone."""


def _another_architecture(file: LoraFile, backbone: Backbone, unmatched: int, misfits: list[str]) -> str:
    made_for = file.base or looks_like([*file.layers])
    counted = [f"{unmatched} of the file's {len(file.layers)} layer names match no layer"] if unmatched else []
    if misfits:
        counted.append(f"{len(misfits)} match layers of a different shape, such as {misfits[0]}")
    guess = f" (apparently {made_for})" if made_for else ""
    return (
        f"{file.path} was made for another architecture{guess}: in {backbone.name} ({backbone.family}), "
        f"{' and '.join(counted)}. Use --backbone to give the model that the LoRA was trained on"
    )


def _split(lora: NamedLora, place: Place, backbone: Backbone) -> Layers:
    """Fits a LoRA to the layers in `place`. Splits its output rows among them, and adds or removes 1x1 kernel axes."""
    weights = []
    for path in place.paths:
        weight = base_weight(backbone, place.component, path)
        if weight is None:
            raise ValueError(
                f"the weight of {place.component}.{path} is stored in a form to which LoRA cannot be applied"
            )
        weights.append(weight)
    rows, shape = [w.shape[0] for w in weights], weights[0].shape[1:]
    up = lora.up.flatten(1) if lora.up.numel() == lora.up.shape[0] * lora.up.shape[1] else lora.up
    fits = lora.down[0].numel() == shape.numel() and up.ndim == 2 and len(up) == sum(rows)
    if not fits or (lora.down.ndim > 2 and lora.down[0].squeeze().shape != weights[0][0].squeeze().shape):
        mine = f"[{sum(rows)}, {', '.join(map(str, shape))}]"
        theirs = f"[{len(lora.up)}, {', '.join(map(str, lora.down.shape[1:]))}]"
        raise _Misfit(f"{lora.name} ({theirs} in the file, {mine} here)")
    down = lora.down.reshape(len(lora.down), *shape)
    kernel = (1,) * (len(shape) - 1)
    magnitude = None if lora.magnitude is None else _per_output(lora, sum(rows), shape.numel())
    ups = _shared_out(up, rows, place.halves_swapped)
    sizes = [None] * len(rows) if magnitude is None else _shared_out(magnitude, rows, place.halves_swapped)
    return {
        (place.component, path): LayerLora(
            down, u.reshape(*u.shape, *kernel).contiguous(), lora.alpha, None if m is None else _as_peft(m, kernel)
        )
        for path, u, m in zip(place.paths, ups, sizes, strict=True)
    }


def _shared_out(values: Tensor, rows: list[int], halves_swapped: bool) -> list[Tensor]:
    if halves_swapped:
        return [values.roll(len(values) // 2, 0)]
    return list(values.split(rows))


def _per_output(lora: NamedLora, outputs: int, inputs: int) -> Tensor:
    """Returns the DoRA magnitude as [out]. Raises ValueError for a magnitude per input, which peft does not support."""
    size = lora.magnitude
    assert size is not None
    if size.numel() == outputs and (
        lora.per_output or (size.shape[0] == outputs > 1 and (size.ndim > 1 or outputs != inputs))
    ):
        return size.reshape(-1)
    raise ValueError(
        f"{lora.name!r} has a DoRA scale of shape {list(size.shape)} on a layer with {outputs} outputs and {inputs} inputs: "
        "only one value per output ([out, 1]) is supported"
    )


def _as_peft(magnitude: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """Reshapes a magnitude for peft, to [out] for a linear layer or to [1, out, 1, 1] for a convolution."""
    return (magnitude.reshape(1, -1, *kernel) if kernel else magnitude).contiguous()


def _adapters(layers: Mapping[tuple[str, str], LayerLora]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns a concept's description of the adapters, and the adapters' tensors."""
    adapters: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    kinds = sorted({(part.magnitude is not None, component) for (component, _), part in layers.items()})
    for dora, component in kinds:
        mine = {p: part for (c, p), part in layers.items() if c == component and (part.magnitude is not None) == dora}
        adapters.setdefault(_SLOT[dora], {})[component] = _settings(mine, dora)
        for path, part in mine.items():
            key = f"{_SLOT[dora]}.{component}.{path}"
            tensors |= {f"{key}.lora_A.weight": part.down, f"{key}.lora_B.weight": part.up}
            if part.magnitude is not None:
                tensors[f"{key}.lora_magnitude_vector"] = part.magnitude
    return adapters, tensors


def _settings(layers: Mapping[str, LayerLora], dora: bool) -> dict[str, Any]:
    rank = _most([len(part.down) for part in layers.values()])
    alpha = _most([part.alpha for part in layers.values()])
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{path}": len(part.down) for path, part in layers.items() if len(part.down) != rank},
        "alpha_pattern": {f"^{path}": part.alpha for path, part in layers.items() if part.alpha != alpha},
        **({"use_dora": True} if dora else {}),
        "target_modules": sorted(layers),
    }


def _most(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
