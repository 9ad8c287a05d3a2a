"""The result of evaluating an asset. An `AssetReport` is saved as JSON, CSV, renders and one HTML page."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pcs_3d.evaluation.shape_scores import Geometry
from shared.metrics.report import Instrument, Row, Score, number

REPORT_FILE, CSV_FILE, SCORES_FILE, HTML_FILE = "report.json", "report.csv", "scores.csv", "report.html"
RENDERS, TRUTH = "renders", "truth"  # folders
ARMS = ("asset", "truth", "sphere")
SCHEMA_VERSION = 1


class ViewRow(Row):
    """One view and its measurements."""

    azimuth_deg: float
    file: str  # in the report's folder
    truth_file: str = ""
    scores: dict[str, float | None] = {}
    seen: dict[str, str] = {}  # the azimuth and the name of the view that instruments estimate from the render

    @field_validator("scores", mode="before")
    @classmethod
    def _no_nan(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {k: number(v) for k, v in value.items()}


class Curve(Row):
    """One score by azimuth around the object, for the asset and, if measured, for the real object and the sphere."""

    key: str
    title: str
    azimuth_deg: list[float]
    asset: list[float | None]
    truth: list[float | None] | None = None
    sphere: list[float | None] | None = None


class Placed(Row):
    """How the mesh was scaled and moved to align it with the real object. It was not rotated."""

    scale: float
    offset: tuple[float, float, float]


class AssetReport(BaseModel):
    """The complete evaluation of one asset. `files` (bytes by name) are saved next to the JSON."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    medium: Literal["asset"] = "asset"
    name: str
    file: str  # the evaluated mesh
    prompt: str = ""  # as given to the instruments, with the class noun in place of the concept
    truth: str = ""
    backbone: str = ""
    created: str = ""  # UTC, ISO 8601
    toybox: bool = False
    scores: list[Score] = []
    views: list[ViewRow] = []
    curves: list[Curve] = []
    geometry: Geometry
    placed: Placed | None = None
    references: list[str] = []  # files in the report's folder
    instruments: list[Instrument] = []
    costs: dict[str, Any] = {}  # time and memory that creating the asset took, as recorded in its asset.json
    notes: list[str] = []
    files: dict[str, bytes] = Field(default={}, exclude=True, repr=False)
    viewer: str = Field(default="", exclude=True, repr=False)  # a page that shows the mesh

    def value(self, key: str) -> float | None:
        """Returns the value of a headline score, or None if it was not measured."""
        return next((s.value for s in self.scores if s.key == key), None)

    def curve(self, key: str) -> Curve | None:
        """Returns one score by azimuth, or None if it was not measured."""
        return next((c for c in self.curves if c.key == key), None)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
