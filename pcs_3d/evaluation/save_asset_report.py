"""Writes an asset's report as a folder with JSON, CSV tables, renders and an HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pcs_3d.evaluation.asset_report import CSV_FILE, HTML_FILE, REPORT_FILE, SCORES_FILE, AssetReport
from pcs_3d.evaluation.page import asset_html
from shared.io.outputs import atomic_folder, write_text
from shared.metrics.clips.save import scores_csv
from shared.metrics.save_report import csv_table, write_files


def save_asset_report(report: AssetReport, out: Path | str, overwrite: bool = False) -> Path:
    """Writes `report.json`, `report.csv` (one row per view), `scores.csv`, `report.html` and the renders. If anything
    fails, nothing is written. Returns the path of `report.html`.

    Raises ValueError if `out` exists and is not empty, unless `overwrite` is set.
    """
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
