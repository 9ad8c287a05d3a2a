"""Aggregates one recipe's assets into one row of a table. Scores are means over subjects, with equal weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pcs_3d.benchmark.asset_cell import AssetCell
from shared.benchmark.aggregate import all_reached, average, interval
from shared.metrics.report import Score

IDENTITY = "identity_relative"


@dataclass(frozen=True)
class AssetGoal:
    """The scores that a recipe must reach, in [0, 1]. None means no requirement.

    If `identity` is set, the asset must also beat one made by the same recipe without the concept, unless the recipe
    cannot run without it. If `iou` is set, the silhouettes' overlap must also beat that of a generic object of the
    class. `iou` does not apply to recipes that were given the shape.
    """

    identity: float | None = None
    view: float | None = None
    iou: float | None = None

    def met(self, row: AssetRow) -> bool | None:
        """Returns whether the row meets the goal, or None if the goal is empty. A score that was not measured counts as
        not reached."""
        found = {"identity": row.value(IDENTITY), "view": row.value("view"), "iou": row.value("iou")}
        if row.shape_given:
            del found["iou"]
        reached = all_reached([(value, getattr(self, name)) for name, value in found.items()])
        if not reached:
            return reached
        identity, iou = row.scores.get(IDENTITY), row.value("iou")
        floors = []
        if self.identity is not None and row.has_base:
            floors.append((row.value(IDENTITY), None if identity is None else identity.base))
        if self.iou is not None and not row.shape_given:
            floors.append((iou, row.generic.get("iou")))
        return all(value is not None and floor is not None and value > floor for value, floor in floors)


@dataclass(frozen=True)
class AssetRow:
    """The mean scores and costs of one recipe over all its subjects.

    scores: the mean scores by key. In each of them, `base` is the score of the same recipe without the concept, and
        `truth` is the score of the real object.
    sphere, generic: the mean scores of a sphere and of a generic object of the class, by key.
    """

    recipe: str
    things: tuple[str, ...]
    scores: Mapping[str, Score]
    sphere: Mapping[str, float]
    generic: Mapping[str, float]
    training_seconds: float | None
    peak_memory: float | None  # bytes
    failed: Mapping[str, str] = field(default_factory=dict)  # subject -> error message
    has_base: bool = True  # False if the recipe learns its subjects itself, and so makes no asset without the concept
    shape_given: bool = False  # whether the assets started from a mesh of the class
    # the subjects left out of pooled figures, with the share of their true renders that are verified
    apart: Mapping[str, float] = field(default_factory=dict)

    def value(self, key: str) -> float | None:
        return self.scores[key].value if key in self.scores else None


def aggregate_assets(
    recipe: str, cells: Mapping[str, AssetCell], failed: Mapping[str, str], pool_all: bool = False
) -> AssetRow:
    """Aggregates all assets of a recipe, with confidence intervals from resampling whole subjects. Unless `pool_all` is
    set, subjects for which the instruments verify too few true renders (`AssetCell.apart`) are left out of the
    scores."""
    apart = {name: c for name, c in cells.items() if c.apart and not pool_all}
    pooled = [c for name, c in cells.items() if name not in apart]
    scores = {s.key: _over(s, pooled) for s in _first_of_each(pooled)}
    return AssetRow(
        recipe,
        tuple(cells),
        scores,
        _known({key: average([s.base for c in pooled if (s := c.score(key))]) for key in scores}),
        _known({key: average([c.generic.get(key) for c in pooled]) for key in scores}),
        average([_cost(c, "training_seconds") for c in cells.values()]),
        average([_cost(c, "training_peak_memory") for c in cells.values()]),
        dict(failed),
        not cells or any(c.base is not None for c in cells.values()),
        shape_given=any(c.shape_given for c in cells.values()),
        apart={name: c.truth or 0.0 for name, c in apart.items()},
    )


def _first_of_each(cells: Sequence[AssetCell]) -> list[Score]:
    """Returns every score that occurs in any cell, taken from the first cell that has it."""
    found: dict[str, Score] = {}
    for cell in cells:
        found |= {s.key: s for s in cell.made.scores if s.key not in found}
    return list(found.values())


def _over(about: Score, cells: Sequence[AssetCell]) -> Score:
    scores = [s for c in cells if (s := c.score(about.key))]
    values = [math.nan if s.value is None else s.value for s in scores]
    low, high = interval(values, about.unit)
    beside: dict[str, Any] = {
        "value": average([s.value for s in scores]),
        "low": low,
        "high": high,
        "base": average([c.base.value(about.key) for c in cells if c.base is not None]),
        "truth": average([s.truth for s in scores]),
        "chance": average([s.chance for s in scores]),
    }
    return about.model_copy(update=beside)


def _cost(cell: AssetCell, key: str) -> float | None:
    value = cell.made.costs.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: v for key, v in values.items() if v is not None}
