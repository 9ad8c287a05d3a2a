"""Writes the concept folder `NAME.concept/` atomically, and reads it without executing anything in it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.concept.schema import ConceptMeta, parse_meta
from shared.config import Part, absent
from shared.io.checksums import sha256
from shared.io.outputs import atomic_folder
from shared.io.safe_paths import safe_relative
from shared.io.safetensors_files import read_safetensors_header, safe_load_safetensors

META = "concept.json"
PREVIEW = "preview.png"
START = "start."  # prefix of the keys in "embeddings" that hold initial values
KINDS = ("adapter", "weights", "branches", "embeddings")  # each is stored in one file, KIND.safetensors
_PNG = b"\x89PNG\r\n\x1a\n"
_DTYPES = ("F32", "F16", "BF16")
_MAX_JSON = 16 * 2**20  # bytes
_MAX_BYTES = 64 * 2**30  # bytes in one tensor file
_MAX_TENSORS = 200_000
_MAX_ENTRIES = 10_000  # files and folders inside a concept
_CODE = frozenset(
    f".{end}"
    for end in (
        *("bin", "pt", "pth", "ckpt", "pkl", "pickle", "joblib", "dill", "npy", "npz", "h5", "msgpack"),
        *("py", "pyc", "pyd", "so", "dll", "dylib", "sh", "bat", "ps1", "exe", "ipynb", "js", "jar"),
    )
)
_TAG = re.compile(rb"(^|[\s\[{,:-])!([\w!<]|$)", re.MULTILINE)


@dataclass(frozen=True)
class Concept:
    """A learned concept, which consists of a description and tensors.

    `tensors` contains float tensors on the CPU, by kind and key. There are four kinds:

    - "adapter", with keys such as `{slot}.{component}.{path}.lora_A.weight`
    - "weights", with a weight delta under each `{slot}.{component}.{path}`
    - "branches", with keys `{slot}.{component}.{first layer}.{key}`
    - "embeddings", with the tensors that the modifier learned under its own keys (for example, the vectors [n, d] of
      learned tokens under `{component}`), and their initial values under `start.{key}`
    """

    meta: ConceptMeta
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    preview: Path | None = None  # a PNG
    path: Path | None = None  # the folder that the concept was read from or saved to

    @property
    def name(self) -> str:
        return self.meta.name

    @property
    def learned_words(self) -> dict[str, Tensor]:
        """The tensors that the modifier learned, under its own keys."""
        return {key: vectors for key, vectors in self.of("embeddings").items() if not key.startswith(START)}

    @property
    def initial_embeddings(self) -> dict[str, Tensor]:
        """The initial values of `learned_words`, under the same keys, or an empty mapping if they were not saved."""
        return {key[len(START) :]: vectors for key, vectors in self.of("embeddings").items() if key.startswith(START)}

    def of(self, kind: str) -> Mapping[str, Tensor]:
        """Returns the tensors of one kind, or an empty mapping if the concept has none."""
        return self.tensors.get(kind, {})


def with_fields(part: Part, **changes: Any) -> Any:
    """Returns a copy of a part with some fields changed. Raises ValueError if the new values are invalid."""
    return type(part).model_validate({**part.model_dump(), **changes})


def adapter_id(tensors: Mapping[str, Mapping[str, Tensor]]) -> str:
    """Returns the sha256 of the adapter, weight and branch tensors (names, shapes, dtypes and values), or "" if there are
    none.

    Concepts that were learned together have the same id.
    """
    digest = hashlib.sha256()
    any_tensor = False
    for kind in ("adapter", "weights", "branches"):
        for key, tensor in sorted(tensors.get(kind, {}).items()):
            any_tensor = True
            digest.update(f"{kind}/{key}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if any_tensor else ""


# --- writing ----------------------------------------------------------------------------------


def save(concept: Concept, path: str | os.PathLike[str], overwrite: bool = False, preview: Any = None) -> Concept:
    """Writes the folder atomically and returns the concept as saved.

    Args:
        preview: a PIL image or the path of a PNG file; by default, the concept's own preview

    Raises ValueError if the output exists and is not empty (unless `overwrite` is set), or if a tensor contains NaN or
    Inf, because `read` would refuse it. With `overwrite`, the old folder stays until the new one is complete.
    """
    _check_finite(concept)
    with atomic_folder(path, overwrite) as folder:
        files = {}
        for kind in KINDS:
            tensors = {k: v.detach().cpu().contiguous().clone() for k, v in concept.of(kind).items()}
            if tensors:
                file = folder / f"{kind}.safetensors"
                save_file(tensors, file, metadata={"format": "pt"})
                files[file.name] = sha256(file)
        picture = concept.preview if preview is None else preview
        if isinstance(picture, str | os.PathLike):
            shutil.copyfile(_png(Path(picture)), folder / PREVIEW)
        elif picture is not None:
            picture.save(folder / PREVIEW, "PNG")
        meta = with_fields(concept.meta, files=files, adapter_id=adapter_id(concept.tensors))
        (folder / META).write_text(dump_json(meta), encoding="utf-8")
    out = Path(path).expanduser()
    return replace(concept, meta=meta, path=out, preview=out / PREVIEW if picture is not None else None)


def _check_finite(concept: Concept) -> None:
    for kind, tensors in concept.tensors.items():
        for key, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{concept.name!r} was not saved: its {kind} tensor {key!r} contains NaN or Inf")


def dump_json(meta: ConceptMeta) -> str:
    """Returns the text of `concept.json`; NaN and Inf become null."""
    return meta.model_dump_json(indent=2) + "\n"


# --- reading ----------------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Concept:
    """Reads the concept in a folder. Nothing in the folder is executed, and the preview is not decoded.

    Raises ValueError, naming the file, if the folder is not a concept; if a file is missing, damaged or too large,
    differs from what `concept.json` describes, or contains NaN or Inf; if a link points outside the folder; or if a
    file in it could contain code.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else absent(folder)
        raise ValueError(f"{folder} {what}: a concept is a folder that contains a {META}")
    if not (folder / META).is_file():
        raise ValueError(f"{folder} is not a concept: it has no {META}")
    _survey(folder)
    meta = read_meta(folder / META)
    _check_listing(folder, meta)
    tensors = {kind: _read_tensors(folder, kind, meta) for kind in KINDS if f"{kind}.safetensors" in meta.files}
    if adapter_id(tensors) != meta.adapter_id:
        raise ValueError(f"{folder / META}: adapter_id does not match the tensors in this folder")
    preview = folder / PREVIEW
    return Concept(meta=meta, tensors=tensors, preview=_png(preview) if preview.is_file() else None, path=folder)


def read_meta(file: Path) -> ConceptMeta:
    """Reads a concept's description. Raises ValueError, naming the file, if it is too large, damaged or from another
    version."""
    if file.stat().st_size > _MAX_JSON:
        raise ValueError(
            f"{file} is {file.stat().st_size:,} bytes; the limit for a concept's description is {_MAX_JSON:,}"
        )
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{file} is damaged: it is not readable JSON{line}") from None
    return parse_meta(data, str(file))


def _survey(folder: Path) -> None:
    """Raises ValueError if a link points outside the folder or if a file could contain code. Must be called before
    anything is loaded."""
    root = folder.resolve()
    count = 0
    for place, folders, files in os.walk(folder, followlinks=False):
        for name in (*folders, *files):
            count += 1
            if count > _MAX_ENTRIES:
                raise ValueError(f"{folder} contains more than {_MAX_ENTRIES:,} files: it is not a concept")
            entry = Path(place) / name
            if entry.is_symlink() and root not in entry.resolve().parents:
                raise ValueError(f"{entry} is a link that points outside the concept; it was not followed")
            _check_harmless(entry)


def _check_harmless(entry: Path) -> None:
    suffix = entry.suffix.lower()
    if suffix in _CODE and not entry.is_dir():
        raise ValueError(
            f"{entry} can contain code ({suffix}) and does not belong in a concept; it was not opened. Remove it first"
        )
    if suffix in (".yaml", ".yml") and entry.is_file():
        with entry.open("rb") as stream:
            text = stream.read(_MAX_JSON + 1)
        if len(text) > _MAX_JSON or _TAG.search(text):
            raise ValueError(
                f"{entry} is YAML with tags, which can contain code, or is too large to be checked for tags; it was "
                "not loaded. Remove it first"
            )


def _check_listing(folder: Path, meta: ConceptMeta) -> None:
    """Raises ValueError unless the folder's tensor files are exactly those listed in `concept.json`."""
    known = {f"{kind}.safetensors" for kind in KINDS}
    for name in meta.files:
        safe_relative(folder, name)
        if name not in known:
            raise ValueError(
                f"{folder / META} lists the file {name!r}; a concept can contain only {', '.join(sorted(known))}"
            )
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, but {META} lists it")
    for name in known - set(meta.files):
        if (folder / name).exists():
            raise ValueError(
                f"{folder / name} is not listed in {META}: it does not belong to this concept and was not opened"
            )


def _read_tensors(folder: Path, kind: str, meta: ConceptMeta) -> dict[str, Tensor]:
    file = folder / f"{kind}.safetensors"
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file} is {file.stat().st_size:,} bytes; the limit is {_MAX_BYTES:,}")
    header, _ = read_safetensors_header(file)
    if not header or len(header) > _MAX_TENSORS:
        raise ValueError(f"{file} contains {len(header):,} tensors; there must be 1 to {_MAX_TENSORS:,}")
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(
                f"{file}: tensor {name!r} is {entry['dtype']}; a concept's tensors must be {' or '.join(_DTYPES)}"
            )
    if sha256(file) != meta.files[file.name]:
        raise ValueError(
            f"{file} is not the file that {META} describes: it was changed or damaged (its sha256 differs)"
        )
    return safe_load_safetensors(file)


def _png(file: Path) -> Path:
    with file.open("rb") as stream:
        if stream.read(len(_PNG)) != _PNG:
            raise ValueError(f"{file} is not a PNG picture; it was not opened")
    return file
