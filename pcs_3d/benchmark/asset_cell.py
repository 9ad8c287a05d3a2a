"""One cell of a recipe comparison: the scores of the asset that one recipe made of one subject, along with reference
scores."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from pcs_3d.evaluation.asset_report import AssetReport
from shared.metrics.report import APART, Instrument, Score

SCHEMA_VERSION = 1


class AssetCell(BaseModel):
    """The reports in a cell.

    made: the report on the asset with the concept.
    base: the report on an asset that the same recipe made when prompted only with the class. It is None for recipes
    that learn the subject themselves.
    generic: the scores of a generic object of the class, by key (`Yardstick.generic_scores`).
    shape_given: whether the recipe started from a mesh of the class, so that it deserves no credit for its silhouettes.
    """

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    thing: str
    made: AssetReport
    base: AssetReport | None = None
    generic: dict[str, float | None] = {}
    shape_given: bool = False

    @property
    def instruments(self) -> list[Instrument]:
        return self.made.instruments

    @property
    def truth(self) -> float | None:
        """The share of the subject's true renders that are verified."""
        verified = self.score("verified")
        return None if verified is None else verified.truth

    @property
    def apart(self) -> bool:
        """Whether this subject is left out of pooled figures because the instruments verify too few of its true
        renders."""
        return self.truth is not None and self.truth < APART

    def score(self, key: str) -> Score | None:
        """Returns a headline score of the asset with the concept, or None if it was not measured."""
        return next((s for s in self.made.scores if s.key == key), None)
