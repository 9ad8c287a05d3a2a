"""Expands a grid into one row for every combination of recipe and settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: The maximum number of rows in a grid; each row is learned and scored on every subject.
MOST = 1000
#: A value: quoted text, a list, a mapping, or anything without a comma.
_VALUE = re.compile(r"""(?:"[^"]*"|\[[^\]]*\]|\{[^}]*\}|[^,])*""")


@dataclass(frozen=True)
class Variant:
    """A recipe and the settings applied to it."""

    recipe: str  # a name or a file
    overrides: tuple[str, ...] = ()  # key=value


def varied(recipes: Mapping[str, str], overrides: Sequence[str], grid: Sequence[str]) -> dict[str, Variant]:
    """Combines every recipe with every combination of the grid's values, which are applied after `overrides`.

    Without a grid, the names stay as they are. With one, they include the settings: "dreambooth_lora train.steps=240".

    Args:
        recipes: name in the table -> recipe
        grid: axes of the form "key=value,value"; commas inside brackets or double quotes belong to a value

    Raises:
        ValueError: for an axis without values, a repeated axis or value, or more than `MOST` rows
    """
    axes = [_axis(item) for item in grid]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"{key} is varied twice: list all of its values together, as {key}=VALUE,VALUE")
    rows = len(recipes)
    for _, values in axes:
        rows *= len(values)
    if rows > MOST:
        raise ValueError(f"the grid has {rows:,} rows; at most {MOST:,} fit in one table")
    out: dict[str, Variant] = {}
    for name, recipe in recipes.items():
        for values in itertools.product(*(values for _, values in axes)):
            changes = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
            out[" ".join([name, *changes])] = Variant(recipe, (*overrides, *changes))
    return out


def _axis(item: str) -> tuple[str, list[str]]:
    """Parses an axis into its key and its values."""
    key, _, text = item.partition("=")
    values = [v.strip().strip('"') for v in _split(text)]
    if not key.strip() or not all(values):
        raise ValueError(f"{item!r} is not an axis of a grid: write key=value,value, for example train.steps=240,360")
    if len(set(values)) != len(values):
        raise ValueError(f"{item!r} lists a value twice")
    return key.strip(), values


def _split(text: str) -> list[str]:
    """Splits at commas, keeping empty values."""
    out, at = [], 0
    while at <= len(text):
        found = _VALUE.match(text, at)
        assert found is not None
        out.append(found.group())
        at = found.end() + 1
    return out
