"""Reads the asset to evaluate, either from a folder that `pcs 3d create` wrote or from a mesh file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pcs_3d.assets import ABOUT
from pcs_3d.evaluation.views import PaintedMesh, painted_mesh
from shared.config import absent, expanded
from shared.io.text_files import read_text_file

MESH = "asset.glb"
_LARGEST = 1 << 24  # maximum size of an asset.json, in bytes


@dataclass(frozen=True)
class Judged:
    """An asset to evaluate. `about` holds the contents of its asset.json; it is empty for a mesh without one."""

    name: str
    file: Path
    mesh: PaintedMesh
    about: Mapping[str, Any] = field(default_factory=dict)

    def said(self, key: str) -> str:
        """Returns the string under this key in asset.json, or "" if there is none."""
        value = self.about.get(key)
        return value if isinstance(value, str) else ""

    @property
    def costs(self) -> dict[str, Any]:
        """The time and memory that creating the asset took. The dictionary is empty if they were not recorded."""
        value = self.about.get("costs")
        return dict(value) if isinstance(value, Mapping) else {}


def read_judged(path: Path | str) -> Judged:
    """Reads the asset in a folder, or the mesh in a file.

    Raises ValueError if the path is missing, if a folder contains no asset, or if a file is not a mesh with faces.
    """
    path = expanded(path)
    if not path.exists():
        raise ValueError(f"{path}: {absent(path, 'no such folder or file')}")
    if path.is_file():
        return Judged(path.name, path, painted_mesh(path))
    if not (path / MESH).is_file():
        what = "an asset without a mesh (its export was null)" if (path / ABOUT).is_file() else "no asset"
        raise ValueError(f"{path} contains {what}: there is no {MESH}, which `pcs 3d create` writes")
    about = _about(path / ABOUT) if (path / ABOUT).is_file() else {}
    return Judged(path.resolve().name, path / MESH, painted_mesh(path / MESH), about)


def _about(file: Path) -> dict[str, Any]:
    try:
        about = json.loads(read_text_file(file, "the description", _LARGEST))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {str(error)[:200]}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{file} was not written by `pcs 3d create`: it is not a JSON object")
    return about
