"""Resolves `base:` in recipe files. Finds and reads the files that a recipe inherits from, root first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import expanded, read_yaml
from shared.recipe.catalog import find, recipe_files


@dataclass(frozen=True)
class Layer:
    """The contents of one recipe file, without its `base`."""

    path: Path
    data: Mapping[str, Any]
    shipped: bool  # whether this is one of the files in `configs`

    @property
    def name(self) -> str:
        return self.path.stem


def read_layers(path: Path, modality: str) -> tuple[Layer, ...]:
    """Reads a recipe file and everything it inherits from, root first.

    `base` is the name of a recipe of the same modality, or the path of a YAML file. A relative path starts from the
    folder of the file that sets `base`.

    Raises:
        ValueError: if a `base` does not exist, or if recipes inherit from each other in a circle. The message names the
            file and its `base`.
    """
    shipped = {p.resolve() for p in recipe_files(modality).values()}
    layers: list[Layer] = []
    while True:
        data = read_yaml(path)
        layers.insert(0, Layer(path, {k: v for k, v in data.items() if k != "base"}, path.resolve() in shipped))
        if "base" not in data:
            return tuple(layers)
        below = _find_base(data["base"], path, modality)
        if below.resolve() in [layer.path.resolve() for layer in layers]:
            chain = " → ".join(p.name for p in [*(layer.path for layer in reversed(layers)), below])
            raise ValueError(
                f"{path.name}: base = {data['base']!r}: the recipes inherit from each other in a circle: {chain}"
            )
        path = below


def _find_base(base: Any, path: Path, modality: str) -> Path:
    if not isinstance(base, str) or not base:
        raise ValueError(f"{path.name}: base = {base!r}: give a recipe's name or the path of its YAML file")
    beside = path.parent / expanded(base)
    try:
        return find(str(beside) if beside.suffix in (".yaml", ".yml") else base, modality)
    except ValueError as error:
        raise ValueError(f"{path.name}: base = {base!r}: {error}") from None
