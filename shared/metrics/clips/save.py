"""A report of clips as a folder: JSON, CSV tables, the clips and one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.io.outputs import atomic_folder, write_text
from shared.io.safe_paths import safe_relative
from shared.metrics.clips.page import clips_html
from shared.metrics.clips.report import ClipReport, ClipRow
from shared.metrics.report import HTML_FILE, REPORT_FILE, Score
from shared.metrics.save_report import csv_table

_SCORE = (
    "key",
    "title",
    "value",
    "low",
    "high",
    "unit",
    "better",
    "base",
    "chance",
    "truth",
    "among_low",
    "among_high",
)
_CLIP = ("kind", "prompt", "text", "seed", "file", "failed", "flags", "moves_like")


def clips_csv(clips: Sequence[ClipRow]) -> str:
    """One row per clip: `score.*`, `expects.*` and `seen.*` as columns; flags joined with "; "."""
    rows = []
    for c in clips:
        row: dict[str, Any] = {"kind": c.kind, "prompt": c.prompt, "text": c.text, "seed": c.seed, "file": c.file}
        row |= {"failed": int(c.failed), "flags": "; ".join(c.flags), "moves_like": c.moves_like}
        row |= {f"score.{k}": "" if v is None else v for k, v in c.scores.items()}
        row |= {f"expects.{k}": v for k, v in c.expects.items()} | {f"seen.{k}": v for k, v in c.seen.items()}
        rows.append(row)
    return csv_table(rows, _CLIP)


def scores_csv(scores: Sequence[Score]) -> str:
    """One headline score a row; empty where something was not measured."""
    rows = [{k: v for k, v in s.model_dump(include=set(_SCORE)).items() if v is not None} for s in scores]
    return csv_table(rows, _SCORE)


def save_clip_report(report: ClipReport, out: Path | str, overwrite: bool = False) -> Path:
    """Writes `report.json`, `scores.csv`, `clips.csv`, `index.html` and the files; all or nothing.

    ValueError when `out` exists and is not empty, unless `overwrite`.
    """
    with atomic_folder(out, overwrite) as folder:
        for name, data in report.files.items():
            path = safe_relative(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        write_text(folder / REPORT_FILE, report.to_json())
        write_text(folder / "scores.csv", scores_csv(report.scores))
        write_text(folder / "clips.csv", clips_csv(report.clips))
        write_text(folder / HTML_FILE, clips_html(report))
    return Path(out) / HTML_FILE
