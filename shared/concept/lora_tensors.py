"""Reads LoRA files from any trainer without executing any code. Tensors and scales keep their names from the file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.concept.diffusers_format import LORA_FILE
from shared.concept.lora_names import PEFT
from shared.config import absent, expanded
from shared.io.failures import reading
from shared.io.safetensors_files import read_safetensors_header, safe_load_safetensors

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # the header key under which diffusers stores each component's LoraConfig
_MAX_BYTES = 64 * 2**30
_MAX_JSON = 16 * 2**20
_PICKLES = (b"PK", b"\x80")

#: Key suffixes in the files of diffusers (including older versions), peft, kohya and LyCORIS.
_ENDS = {
    "down": re.compile(r"(\.lora_A(\.\w+)?|\.lora(_linear_layer)?\.down|_lora\.down|\.lora_down)\.weight$"),
    "up": re.compile(r"(\.lora_B(\.\w+)?|\.lora(_linear_layer)?\.up|_lora\.up|\.lora_up)\.weight$"),
    "mid": re.compile(r"\.lora_mid\.weight$"),
    "alpha": re.compile(r"\.alpha$"),
    "dora_scale": re.compile(r"\.dora_scale$"),
    "magnitude": re.compile(r"\.lora_magnitude_vector(\.\w+)?(\.weight)?$"),
}
_OTHER_KINDS = (
    ("LoHa", re.compile(r"\.hada_")),
    ("LoKr", re.compile(r"\.lokr_")),
    ("OFT", re.compile(r"\.(oft_|boft_)|\.oft_R\.")),
    ("full weights (LyCORIS full)", re.compile(r"\.diff(_b)?$")),
    ("(IA)^3", re.compile(r"\.on_input$|ia3_l")),
    ("LoRA with a bias", re.compile(r"\.lora_B(\.\w+)?\.bias$|\.lora_up\.bias$")),
    ("LoRA of an embedding", re.compile(r"\.lora_embedding_[AB]")),
)


@dataclass
class NamedLora:
    """The update, scale * up @ down, that a file stores under one name."""

    name: str  # as in the file, without the suffix for the kind of tensor
    down: Tensor  # [r, in, …]
    up: Tensor  # [out, r, …]
    alpha: float  # scale * r
    magnitude: Tensor | None = None  # the DoRA magnitude, as in the file
    per_output: bool = False  # whether the magnitude is known to have one value per output row, as peft's always does


@dataclass
class LoraFile:
    """The contents of a LoRA file, under the names in the file."""

    path: Path
    layers: dict[str, NamedLora] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)  # keys that are not part of a LoRA
    base: str = ""  # the base model stated in the file's header


def find_file(path: Path) -> Path:
    """Returns the path of a LoRA file, given that path or a folder written by diffusers or peft. Raises ValueError if
    there is no such file."""
    path = expanded(str(path))
    if path.is_dir():
        found = [path / name for name in (LORA_FILE, PEFT_FILE) if (path / name).is_file()]
        if len(found) != 1:
            what = "both" if found else "neither"
            raise ValueError(
                f"{path}: expected either {LORA_FILE} or {PEFT_FILE}, but found {what}; give the path of the file"
            )
        return found[0]
    if not path.is_file():
        raise ValueError(f"the LoRA file {path} {absent(path)}")
    return path


def read_lora_file(path: Path) -> LoraFile:
    """Reads the low-rank tensors of a file in fp32, each pair with the scale that its training program intended.

    alpha comes from tensors in the file (kohya), from an `adapter_config.json` next to the file (peft), or from the
    file's header (diffusers). If a diffusers or kohya file has no alpha, alpha is the rank, as in those programs.

    Raises ValueError, naming the file and the key, if the file is not in safetensors format (for example, if it is a
    pickle), if half of a pair is missing, if the method is neither LoRA nor DoRA, or if the `adapter_config.json` of a
    peft file is missing.
    """
    path = find_file(path)
    _refuse_pickle(path)
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} is {path.stat().st_size:,} bytes; the limit is {_MAX_BYTES:,}")
    header, metadata = read_safetensors_header(path)
    other = next((kind for kind, sign in _OTHER_KINDS if any(sign.search(key) for key in header)), "")
    if other:
        key = next(k for k in header if dict(_OTHER_KINDS)[other].search(k))
        raise ValueError(f"{path} contains {other} (for example {key!r}): only LoRA and DoRA are supported")
    parts: dict[str, dict[str, Tensor]] = {}
    out = LoraFile(path, base=metadata.get("ss_base_model_version", ""))
    for key, tensor in safe_load_safetensors(path).items():
        kind = next((k for k, end in _ENDS.items() if end.search(key)), "")
        if not kind or not (kind == "alpha" or tensor.is_floating_point()):
            out.others.append(key)
        else:
            parts.setdefault(_ENDS[kind].sub("", key), {})[kind] = tensor.float()
    scales = _Scales(path, metadata, any(name.startswith(PEFT) for name in parts))
    for name, tensors in parts.items():
        if not {"down", "up"} & tensors.keys():
            out.others += [f"{name} ({', '.join(tensors)})"]
        else:
            out.layers[name] = _layer(path, name, tensors, scales)
    if not out.layers:
        some = ", ".join(sorted(header)[:3]) or "nothing at all"
        raise ValueError(f"{path} is not a LoRA: it contains no pair of low-rank tensors (found: {some})")
    return out


def _refuse_pickle(path: Path) -> None:
    with reading(path), path.open("rb") as stream:
        start = stream.read(2)
    if start.startswith(_PICKLES):
        raise ValueError(
            f"{path} is a pickle, which can contain code, so it was not opened. Convert it to safetensors first"
        )


def _layer(path: Path, name: str, tensors: Mapping[str, Tensor], scales: _Scales) -> NamedLora:
    missing = next((kind for kind in ("down", "up") if kind not in tensors), "")
    if missing:
        raise ValueError(f"{path}: {name!r} has only half a pair (the {missing} matrix is missing)")
    down, up, mid = tensors["down"], tensors["up"], tensors.get("mid")
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
        raise ValueError(
            f"{path}: {name!r} has matrices {list(down.shape)} and {list(up.shape)}, which do not form a pair"
        )
    if mid is not None:  # LyCORIS' Tucker form, with a convolution between two 1x1 convolutions
        if mid.ndim < 3 or mid.shape[:2] != (down.shape[0], down.shape[0]):
            raise ValueError(
                f"{path}: {name!r} has a middle tensor of shape {list(mid.shape)}, which does not match rank "
                f"{down.shape[0]}"
            )
        down = torch.einsum("rs...,si->ri...", mid, down.flatten(1))
    rank = down.shape[0]
    if "alpha" in tensors and tensors["alpha"].numel() != 1:
        raise ValueError(f"{path}: {name!r} has an alpha of shape {list(tensors['alpha'].shape)} instead of one number")
    alpha = float(tensors["alpha"]) if "alpha" in tensors else scales.alpha(name, rank)
    magnitude = tensors.get("magnitude", tensors.get("dora_scale"))
    return NamedLora(name, down, up, alpha, magnitude, "magnitude" in tensors)


class _Scales:
    """Finds alpha for files that store it separately from the tensors."""

    def __init__(self, path: Path, metadata: Mapping[str, str], peft: bool) -> None:
        self.path, self.peft = path, peft
        self.settings: dict[str, Mapping[str, Any]] = {}  # component -> its LoraConfig; "" for a peft file
        if peft:
            self.settings[""] = self._peft_config()
        elif _METADATA in metadata:
            self._from_header(metadata[_METADATA])
        for where, settings in self.settings.items():
            if settings.get("peft_type", "LORA") != "LORA":
                raise ValueError(f"{path} is {settings['peft_type']}: only LoRA and DoRA are supported")
            if settings.get("bias", "none") != "none" or settings.get("modules_to_save"):
                raise ValueError(
                    f"{path}{f' ({where})' if where else ''} also changes weights outside its LoRA, which is not "
                    "supported"
                )

    def alpha(self, name: str, rank: int) -> float:
        """Returns alpha, where alpha / rank is the scale. Raises ValueError if the settings state a different rank."""
        component = "" if self.peft else name.partition(".")[0]
        settings = self.settings.get(component)
        if settings is None:
            return float(rank)
        from peft.utils.other import get_pattern_key

        path = name.removeprefix(PEFT) if self.peft else name.partition(".")[2]
        ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
        said = ranks.get(get_pattern_key(list(ranks), path), settings.get("r", 8))
        alpha = alphas.get(get_pattern_key(list(alphas), path), settings.get("lora_alpha", 8))
        if said != rank:
            raise ValueError(
                f"{self.path}: {name!r} has rank {rank}, but its settings state {said}, "
                "so the tensors and the settings do not belong together"
            )
        return float(alpha) * (math.sqrt(rank) if settings.get("use_rslora") else 1.0)

    def _peft_config(self) -> Mapping[str, Any]:
        file = self.path.with_name(PEFT_CONFIG)
        if not file.is_file():
            raise ValueError(
                f"{self.path} is a peft file, but {PEFT_CONFIG}, which contains the LoRA's scale, is not next to it"
            )
        if file.stat().st_size > _MAX_JSON:
            raise ValueError(f"{file} is too large for a settings file")
        return _settings(file.read_bytes(), str(file))

    def _from_header(self, text: str) -> None:
        for key, value in _settings(text.encode(), f"{self.path}: {_METADATA}").items():
            component, _, setting = key.partition(".")
            self.settings[component] = {**self.settings.get(component, {}), setting: value}


def _settings(text: bytes, where: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (UnicodeDecodeError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise ValueError(f"{where} is damaged: it contains no settings")
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern"):
        for name, value in data.items():
            if name.rpartition(".")[2] == key and not _plain(value):
                raise ValueError(f"{where}: {name} = {str(value)[:80]} is not a number")
    return data


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and re.fullmatch(r"[\w.^$-]{1,512}", k) and _plain(v) for k, v in value.items())
    return value is None or (isinstance(value, int | float) and math.isfinite(value))
