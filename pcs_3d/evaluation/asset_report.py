"""What an evaluation of an asset found: an `AssetReport`, kept as JSON, CSV, renders and one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared.metrics.report import Instrument, Row, Score, number

REPORT_FILE, CSV_FILE, SCORES_FILE, HTML_FILE = "report.json", "report.csv", "scores.csv", "report.html"
RENDERS, TRUTH = "renders", "truth"  # folders
ARMS = ("asset", "truth", "sphere")
SCHEMA_VERSION = 1


class ViewRow(Row):
    """One view, and all that was measured on it."""

    azimuth_deg: float
    file: str  # below the report's folder
    truth_file: str = ""
    scores: dict[str, float | None] = {}
    seen: dict[str, str] = {}  # azimuth and name of the view, as instruments read them

    @field_validator("scores", mode="before")
    @classmethod
    def _no_nan(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {k: number(v) for k, v in value.items()}


class Curve(Row):
    """One score once around the thing; of the truth and of the sphere as well, where they have it."""

    key: str
    title: str
    azimuth_deg: list[float]
    asset: list[float | None]
    truth: list[float | None] | None = None
    sphere: list[float | None] | None = None


class Placed(Row):
    """How the mesh was brought over its truth. It was not turned."""

    scale: float
    offset: tuple[float, float, float]


class GeometryRow(Row):
    """As `shape_scores.Geometry`."""

    faces: int
    vertices: int
    watertight: bool
    components: int
    largest_component: float
    volume: float | None
    share_of_box: float | None


class AssetReport(BaseModel):
    """The whole evaluation of one asset. `files` (bytes by name) are kept beside the JSON."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    medium: Literal["asset"] = "asset"
    name: str
    file: str  # the mesh that was judged
    prompt: str = ""  # as instruments read it
    truth: str = ""
    backbone: str = ""
    created: str = ""  # UTC, ISO 8601
    toybox: bool = False
    scores: list[Score] = []
    views: list[ViewRow] = []
    curves: list[Curve] = []
    geometry: GeometryRow
    placed: Placed | None = None
    references: list[str] = []  # files below the report's folder
    instruments: list[Instrument] = []
    costs: dict[str, Any] = {}  # of making it, as it says itself
    notes: list[str] = []
    files: dict[str, bytes] = Field(default={}, exclude=True, repr=False)

    def value(self, key: str) -> float | None:
        """The value of a headline score; None when it was not measured."""
        return next((s.value for s in self.scores if s.key == key), None)

    def curve(self, key: str) -> Curve | None:
        """One score by azimuth; None when it was not measured."""
        return next((c for c in self.curves if c.key == key), None)

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def save_asset_report(report: AssetReport, out: Path | str, overwrite: bool = False) -> Path:
    """Writes `report.json`, `report.csv` (one row per view), `scores.csv`, `report.html` and the renders; all or nothing.

    ValueError when `out` exists and is not empty, unless `overwrite`.
    """
    from pcs_3d.evaluation.page import asset_html
    from shared.io.outputs import atomic_folder, write_text
    from shared.metrics.clips.save import scores_csv
    from shared.metrics.save_report import csv_table, write_files

    rows = []
    for view in report.views:
        row: dict[str, Any] = {"azimuth_deg": view.azimuth_deg, "file": view.file}
        row |= {f"score.{k}": "" if v is None else v for k, v in view.scores.items()}
        rows.append(row | {f"seen.{k}": v for k, v in view.seen.items()})
    with atomic_folder(out, overwrite) as folder:
        write_files(report.files, folder)
        write_text(folder / REPORT_FILE, report.to_json())
        write_text(folder / CSV_FILE, csv_table(rows, ("azimuth_deg", "file")))
        write_text(folder / SCORES_FILE, scores_csv(report.scores))
        write_text(folder / HTML_FILE, asset_html(report))
    return Path(out) / HTML_FILE
