"""Where a concept comes from, and how that is written down so that writing it cannot fail."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from shared.backbones.load import WORLDS
from shared.concept.schema import Kind
from shared.config import Part
from shared.io.checksums import sha256
from shared.io.terminal import escaped_name

_ABSOLUTE = re.compile(r"^([/~\\]|[A-Za-z]:[/\\])")
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Provenance:
    """How a concept was made: what `concept.json` says of it besides its tensors.

    Args:
        modifier: the part that named it; the recipe's where it is not given
        recipe: resolved; folders in the user's paths are left out, for a concept is made to be given away
        metrics: numbers, texts, or mappings of them; what is no finite number becomes null
        references: the pictures' files, or {"file": name without folders, "sha256": …} of each
        seed: the recipe's where it is not given
        ports: roles that a stand-in took
        preview: a PNG
    """

    kind: Kind = "subject"
    class_noun: str = ""
    modifier: Part | Mapping[str, Any] | None = None
    recipe: Part | Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    references: Iterable[Path | Mapping[str, str]] = ()
    seed: int | None = None
    ports: Iterable[str] = ()
    preview: Path | None = None

    def settings(self) -> dict[str, Any]:
        """The recipe as plain data."""
        return plain(self.recipe)

    def described(self) -> dict[str, Any]:
        """The fields of `concept.json` that only tell: none of them is needed to load the concept."""
        return {
            "class_noun": plain(self.class_noun),
            "recipe": portable(self.settings()),
            "metrics": flat(self.metrics),
            "references": [_reference(r) for r in self.references],
            "ports": [plain(str(p)) for p in self.ports],
            "versions": _versions(),
        }


def plain(value: Any) -> Any:
    """Any settings as data that JSON holds: paths and other objects become texts, numbers that are none become null,
    and what is not Unicode in a text (bytes of a file name) is escaped."""
    if value is None:
        return {}
    return _plain(value.model_dump(by_alias=True) if isinstance(value, Part) else value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {_text(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a number of torch or numpy
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else _text(value)


def _text(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Metrics by dotted names; what is neither a finite number nor a text becomes null."""
    out: dict[str, Any] = {}
    for key, value in metrics.items():
        name = f"{prefix}{_text(key)}"
        if isinstance(value, Mapping):
            out.update(flat(value, f"{name}."))
        else:
            plain = _plain(value)
            out[name] = plain if isinstance(value, str) or isinstance(plain, int | float) else None
    return out


def portable(value: Any) -> Any:
    """A recipe without the folders of its author's machine."""
    if isinstance(value, Mapping):
        return {k: public_name(v) if k == "backbone" and isinstance(v, str) else portable(v) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v) for v in value]
    return _last(value) if isinstance(value, str) and _ABSOLUTE.match(value) else value


def public_name(backbone: str) -> str:
    """The last name of a model that is a folder or file here; anything else (toybox, a hub id) as it is."""
    local = _ABSOLUTE.match(backbone) or backbone.startswith(".") or Path(backbone).exists()
    return _last(_text(PurePath(Path(backbone).absolute()))) if local and backbone not in WORLDS else _text(backbone)


def _last(path: str) -> str:
    if path[0] in "/~":  # where a backslash is a letter of a name
        return path.rstrip("/").rpartition("/")[2]
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _reference(picture: Path | Mapping[str, str]) -> dict[str, Any]:
    if isinstance(picture, Mapping):
        return dict(picture)
    try:
        digest = sha256(picture)
    except OSError:  # moved or removed while the concept was learned
        digest = None
    return {"file": escaped_name(picture.name), "sha256": digest}


def _versions() -> dict[str, str]:
    out = {}
    for package in _PACKAGES:
        try:
            out[package] = str(metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    return out
