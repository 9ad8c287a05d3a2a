"""Records how a concept was learned, as data that can always be written to JSON."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from shared.backbones.load import WORLDS
from shared.concept.schema import Kind
from shared.config import Part
from shared.io.checksums import sha256
from shared.io.terminal import escaped_name

_DRIVE = re.compile(r"[A-Za-z]:[/\\]")
# matches "/home/jane/x", "~/x", "C:\\x" and "file:///x", but not the prompt "/imagine a cat"
_ABSOLUTE = re.compile(rf"([/\\]|~)[^\s/\\]*([/\\]|$)|{_DRIVE.pattern}|file:", re.IGNORECASE)
_WINDOWS = re.compile(rf"{_DRIVE.pattern}|\.{{0,2}}\\")
# matches the folders in an absolute path within a text, but not "/imagine", "and/or" or "https://a/b/c"
_FOLDERS = re.compile(r"""(?<![\w/\\~.:])([A-Za-z]:)?[/\\]+([^\s/\\'"<>|:]+[/\\]+)+""")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?|https?://.*", re.ASCII)
_WEIGHTS = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
#: Keys whose values are paths (`PathText`), and keys whose values are names or paths of models (`NameOrPath`).
_PATHS = frozenset({"images", "clips", "masks", "captions", "path", "mask", "model", "output"})
_MODELS = frozenset({"backbone", "motion_adapter"})
_PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors")


@dataclass(frozen=True)
class Provenance:
    """How a concept was learned, as recorded in `concept.json`.

    Args:
        modifier: the part that gave the concept its words; by default, the recipe's modifier
        recipe: the resolved recipe; folders in the user's paths are removed, because a concept is meant to be shared
        metrics: numbers, strings, or mappings that contain such values; numbers that are not finite become null
        references: for each picture, its file or a mapping {"file": name without folders, "sha256": …}
        seed: the training seed; by default, the recipe's seed
        ports: notes on ports, which are roles for which other layers stand in
        preview: a PNG file
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
        """Returns the recipe as plain data."""
        return plain(self.recipe)

    def described(self) -> dict[str, Any]:
        """Returns the descriptive fields of `concept.json`; none of them is needed to load the concept."""
        return {
            "class_noun": plain(self.class_noun),
            "recipe": portable(self.settings()),
            "metrics": flat(self.metrics),
            "references": [_reference(r) for r in self.references],
            "ports": [plain(str(p)) for p in self.ports],
            "versions": _versions(),
        }


def plain(value: Any) -> Any:
    """Converts any settings to JSON data. Paths and other objects become strings, and NaN and Inf become null. Bytes of
    a file name that are not valid Unicode are escaped. None becomes an empty mapping."""
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
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:  # a torch or numpy scalar
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else _text(value)


def _text(value: object) -> str:
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def flat(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested metrics to dotted names. Any value other than a finite number or a string becomes null."""
    out: dict[str, Any] = {}
    for key, value in metrics.items():
        name = f"{prefix}{_text(key)}"
        if isinstance(value, Mapping):
            out.update(flat(value, f"{name}."))
        else:
            plain = _plain(value)
            out[name] = plain if isinstance(value, str) or isinstance(plain, int | float) else None
    return out


def portable(value: Any, key: str = "") -> Any:
    """Returns a recipe in which paths no longer contain folders on the author's machine.

    Args:
        key: the key of `value` in its recipe, which shows whether a string is a path
    """
    if isinstance(value, Mapping):
        return {k: portable(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [portable(v, key) for v in value]
    if not isinstance(value, str):
        return value
    if key in _MODELS:
        return public_name(value)
    return _last(value) if key in _PATHS or _ABSOLUTE.match(value) else value


def portable_text(text: str) -> str:
    """Returns a message or traceback in which paths no longer contain folders on the author's machine. Paths of Python
    modules start at their package."""
    for root in sorted({str(Path(p).absolute()) for p in sys.path if p}, key=len, reverse=True):
        text = text.replace(root.rstrip(os.sep) + os.sep, "")
    home = str(Path.home())
    return _FOLDERS.sub("", text if len(home) < 2 else text.replace(home, "~"))


def public_name(backbone: str) -> str:
    """Returns only the last path component if the model is a local folder or file. Any other name (toybox, a hub id) is
    returned unchanged.

    A name that is not an existing path still counts as local if it cannot be a hub id, which has at most one slash.
    """
    hub_id = _HUB_ID.fullmatch(backbone) and not backbone.startswith(".") and not backbone.endswith(_WEIGHTS)
    if backbone in WORLDS or (hub_id and not Path(backbone).exists()):
        return _text(backbone)
    name = _last(backbone)
    return _text(name if name.strip(".") else Path(backbone).absolute().name)


def _last(path: str) -> str:
    path = re.sub("^file:(?=.)", "", path, flags=re.IGNORECASE)
    if os.sep == "/" and not _WINDOWS.match(path):  # a backslash is an ordinary character here, and may escape a byte
        return path.rstrip("/").rpartition("/")[2]
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _reference(picture: Path | Mapping[str, str]) -> dict[str, Any]:
    if isinstance(picture, Mapping):
        return dict(picture)
    try:
        digest = sha256(picture)
    except OSError:  # moved or removed during training
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
