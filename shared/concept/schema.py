"""What `concept.json` holds, and what is accepted in it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from shared.config import NAME, Part, validate

SCHEMA_VERSION = 1
Name = Annotated[str, Field(pattern=NAME)]
LayerPath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,512}$")]  # dotted, of a layer or a parameter
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["subject", "style", "motion", "identity"]

#: Settings of peft adapters that a concept may carry. Others could import modules, read files, or change base weights.
_ADAPTER_KEYS = frozenset(
    (
        *("peft_type", "r", "target_modules", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
        *("lora_alpha", "lora_dropout", "use_dora", "use_rslora"),
        *("alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "decompose_both", "decompose_factor"),
        *("oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms"),
    )
)
_MAX_RANK = 4096
_PLAIN_PATH = re.compile(r"[\w.^$-]{1,256}")


class BackboneInfo(Part):
    """The model that a concept was learned on."""

    family: str
    name: str  # as the user gave it: "toybox", a hub id, a folder
    fingerprint: str  # of architecture and shapes
    checkpoint: str  # of the weights
    parts: dict[str, str] = Field(default_factory=dict)  # component -> class and number of parameters, for messages


class Reference(Part):
    """A picture that the concept was learned from: its file name without folders, and its hash."""

    file: Annotated[str, Field(min_length=1, max_length=255)]
    sha256: Sha256

    @field_validator("file")
    @classmethod
    def _name_only(cls, value: str) -> str:
        if "/" in value or "\\" in value or value in (".", "..") or not value.isprintable():
            raise ValueError("must be a file name without folders")
        return value


class ConceptMeta(Part):
    """`concept.json`. Plain data: nothing in it is imported, evaluated or followed as a path."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Name
    kind: Kind = "subject"
    class_noun: Annotated[str, Field(max_length=200)] = ""
    modifier: dict[str, Any] = Field(default_factory=dict)  # the modifier part; empty: nothing names this concept
    backbone: BackboneInfo
    adapters: dict[Name, dict[Name, dict[str, Any]]] = Field(default_factory=dict)  # slot -> component -> peft settings
    weights: dict[Name, dict[Name, tuple[LayerPath, ...]]] = Field(
        default_factory=dict
    )  # slot -> component -> parameters
    adapter_id: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""  # of adapter and weight tensors
    requires: tuple[Annotated[str, Field(max_length=200)], ...] = ()  # components that the backbone must have
    recipe: dict[str, Any] = Field(default_factory=dict)  # resolved
    ports: tuple[str, ...] = ()  # roles that a stand-in took
    metrics: dict[str, Any] = Field(default_factory=dict)
    references: tuple[Reference, ...] = ()
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    created: str = ""  # ISO 8601
    files: dict[str, Sha256] = Field(default_factory=dict)  # tensor file -> hash of its bytes; written by `save`

    @field_validator("adapters")
    @classmethod
    def _safe_adapters(cls, value: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
        for slot, components in value.items():
            for component, settings in components.items():
                check_adapter(settings, f"{slot}.{component}")
        return value


def check_adapter(settings: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for adapter settings that are not plain numbers, switches and names of a bounded size."""
    for key, value in settings.items():
        if key not in _ADAPTER_KEYS:
            raise ValueError(f"{where} has the adapter setting {key!r}, which is not accepted from a file")
        if not _plain(value):
            raise ValueError(
                f"{where}.{key} must be a number, a switch, or names of modules, and is {str(value)[:80]!r}"
            )
    ranks = [settings.get("r", 8), *_values(settings.get("rank_pattern"))]
    if any(not isinstance(r, int) or not 0 < r <= _MAX_RANK for r in ranks):
        raise ValueError(f"{where}: ranks must be whole numbers from 1 to {_MAX_RANK}, and are {ranks[:4]}")
    if not isinstance(settings.get("target_modules"), list):
        raise ValueError(f"{where}.target_modules must be a list of module names")


def _plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return _PLAIN_PATH.fullmatch(value) is not None
    if isinstance(value, list):
        return all(isinstance(v, str) and _plain(v) for v in value)
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(k) and isinstance(v, int | float) for k, v in value.items())
    return value is None or isinstance(value, bool | int)


def _values(pattern: Any) -> list[Any]:
    return list(pattern.values()) if isinstance(pattern, Mapping) else []


def parse_meta(data: Any, where: str) -> ConceptMeta:
    """`concept.json` as a validated object. ValueError, placeholder the file and the key, when something is not right."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must hold an object with the concept's description, and holds {type(data).__name__}")
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        hint = (
            "it was made by a newer version of the suite: update this one"
            if newer
            else "it is not a concept that this suite made"
        )
        raise ValueError(f"{where} has schema version {version!r}, this version reads {SCHEMA_VERSION}: {hint}")
    return validate(ConceptMeta, data, where=where)
