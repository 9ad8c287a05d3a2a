"""Saves a report of clips as a folder: JSON, CSV tables, the clips and one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.io.outputs import atomic_folder, write_text
from shared.metrics.clips.page import clips_html
from shared.metrics.clips.report import ClipReport
from shared.metrics.report import HTML_FILE, REPORT_FILE, SCORE_COLUMNS, Score
from shared.metrics.save_report import csv_table, made_csv, write_files


def scores_csv(scores: Sequence[Score]) -> str:
    """Returns CSV with one headline score per row. Cells are empty where nothing was measured."""
    rows = [{k: v for k, v in s.model_dump(include=set(SCORE_COLUMNS)).items() if v is not None} for s in scores]
    return csv_table(rows, SCORE_COLUMNS)


def save_clip_report(report: ClipReport, out: Path | str, overwrite: bool = False) -> Path:
    """Writes `report.json`, `scores.csv`, `clips.csv`, `index.html` and the report's files, either all of them or none.

    Raises ValueError if `out` exists and is not empty, unless `overwrite` is set.
    """
    with atomic_folder(out, overwrite) as folder:
        write_files(report.files, folder)
        write_text(folder / REPORT_FILE, report.to_json())
        write_text(folder / "scores.csv", scores_csv(report.scores))
        write_text(folder / "clips.csv", made_csv(report.clips, "moves_like"))
        write_text(folder / HTML_FILE, clips_html(report))
    return Path(out) / HTML_FILE
