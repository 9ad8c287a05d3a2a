"""The schema of `concept.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from shared.attention import Attention
from shared.concept.learning_record import LearnedWith, learned_with
from shared.config import NAME, Part, validate
from shared.io.adapter_settings import check_adapter
from shared.io.branch_settings import BranchSettings

SCHEMA_VERSION = 2
Name = Annotated[str, Field(pattern=NAME)]
# the dotted path of a layer or parameter, which is used only for lookup
LayerPath = Annotated[str, Field(min_length=1, max_length=512)]
Shape = tuple[Annotated[int, Field(ge=0)], ...]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["subject", "style", "motion", "identity"]


def _measured(value: Any) -> Any:
    if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("must be a finite number, a string, or null")
    return value


Metric = Annotated[Any, AfterValidator(_measured)]
_ESCAPE = re.compile(r"\\(u[0-9a-f]{4}|U[0-9a-f]{8})")  # the escapes that `shared.io.terminal.escaped_name` writes


class BackboneInfo(Part):
    """The model that a concept was learned on."""

    family: str
    name: str  # "toybox", a hub id, or the last component of a local path
    checkpoint: str  # fingerprint of all its weights
    layers: str = ""  # fingerprint of the weights that the concept touches


class Reference(Part):
    """A picture that the concept was learned from: its file name without folders, and its hash."""

    file: Annotated[str, Field(min_length=1, max_length=4096)]  # escaped, so it can be longer than the usual 255 bytes
    sha256: Sha256 | None  # null if the file was gone when the concept was saved

    @field_validator("file")
    @classmethod
    def _name_only(cls, value: str) -> str:
        if "/" in value or "\\" in _ESCAPE.sub("", value) or value in (".", "..") or not value.isprintable():
            raise ValueError("must be a file name without folders, with unprintable characters escaped")
        return value


class ConceptMeta(Part):
    """The contents of `concept.json`: plain data that is never imported, evaluated or followed as a path."""

    schema_version: Literal[2] = SCHEMA_VERSION
    name: Name
    kind: Kind = "subject"
    class_noun: str = ""
    # the modifier part; empty if the concept has no words in prompts
    modifier: dict[str, Any] = Field(default_factory=dict)
    backbone: BackboneInfo
    adapters: dict[Name, dict[Name, dict[str, Any]]] = Field(default_factory=dict)  # slot -> component -> peft settings
    # slot -> component -> parameters
    weights: dict[Name, dict[Name, tuple[LayerPath, ...]]] = Field(default_factory=dict)
    # slot -> component -> form and layers
    branches: dict[Name, dict[Name, BranchSettings]] = Field(default_factory=dict)
    attention: dict[Name, Attention] = Field(default_factory=dict)  # slot -> its change to the model's attention
    # component -> touched layer or parameter -> base shape
    layers: dict[Name, dict[LayerPath, Shape]] = Field(default_factory=dict)
    embeddings: dict[Name, int] = Field(default_factory=dict)  # text encoder -> width of its token embeddings
    # hash of the adapter, weight and branch tensors
    adapter_id: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    recipe: dict[str, Any] = Field(default_factory=dict)  # resolved; other code reads only the parts in `learned_with`
    ports: tuple[str, ...] = ()  # notes on roles for which other layers stand in
    metrics: dict[str, Metric] = Field(default_factory=dict)
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

    @field_validator("layers")
    @classmethod
    def _all_layers(cls, value: dict[str, dict[str, Shape]], info: ValidationInfo) -> dict[str, dict[str, Shape]]:
        """Checks that `layers` lists everything that is adapted or changed, because `fits` checks only these layers."""
        adapters, weights = info.data.get("adapters", {}), info.data.get("weights", {})
        touched = [
            *((c, p) for parts in adapters.values() for c, s in parts.items() for p in s["target_modules"]),
            *((c, p) for parts in weights.values() for c, paths in parts.items() for p in paths),
            *((c, p) for parts in info.data.get("branches", {}).values() for c, s in parts.items() for p in s.layers),
        ]
        for component, path in touched:
            if path not in value.get(component, {}):
                raise ValueError(f"{component} does not list {path!r}, which the concept touches")
        return value

    @property
    def learned_with(self) -> LearnedWith:
        """The validated parts of the recipe that other code reads. Raises ValueError, naming the key, if one of them is
        invalid."""
        return learned_with(self.recipe, self.metrics, f"the concept {self.name!r}")


def parse_meta(data: Any, where: str) -> ConceptMeta:
    """Validates the contents of `concept.json`. Raises ValueError, naming the file and the key, if it is invalid."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{where} must contain an object with the concept's description; got {type(data).__name__}")
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(f"{where} has schema version {version!r}, so it was not made by pcs")
    if version != SCHEMA_VERSION:
        age = (
            "it was made by an older version of pcs; learn the concept again"
            if version < SCHEMA_VERSION
            else f"it was made by a newer version of pcs, and this version reads schema {SCHEMA_VERSION}; update pcs"
        )
        raise ValueError(f"{where} has schema {version}: {age}")
    meta = validate(ConceptMeta, data, where=where)
    learned_with(meta.recipe, meta.metrics, where)  # report errors now rather than when these parts are used
    return meta
