"""Saves a report as a folder with JSON, CSV tables, pictures and an HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.io.outputs import atomic_folder, write_text
from shared.io.safe_paths import safe_relative
from shared.metrics.html import report_html
from shared.metrics.report import HTML_FILE, REPORT_FILE, PictureRow, PromptRow, Report

if TYPE_CHECKING:
    from shared.metrics.clips.report import ClipRow


def csv_table(rows: Iterable[Mapping[str, Any]], first: Sequence[str]) -> str:
    """Returns rows as CSV, with the columns in `first` followed by all others in alphabetical order."""
    rows = list(rows)
    rest = sorted({k for r in rows for k in r} - set(first))
    out = io.StringIO()
    writer = csv.DictWriter(out, [*first, *rest], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def made_csv(made: Sequence[PictureRow] | Sequence[ClipRow], last: str) -> str:
    """Returns CSV with one row per picture or clip, with `score.*`, `expects.*` and `seen.*` columns, and with flags
    joined by "; ". `last` is a column that exists only for pictures or only for clips."""
    rows = []
    for m in made:
        row: dict[str, Any] = {"kind": m.kind, "prompt": m.prompt, "text": m.text, "seed": m.seed, "file": m.file}
        row |= {"failed": int(m.failed), "flags": "; ".join(m.flags), last: getattr(m, last)}
        row |= {f"score.{k}": "" if v is None else v for k, v in m.scores.items()}
        row |= {f"expects.{k}": v for k, v in m.expects.items()} | {f"seen.{k}": v for k, v in m.seen.items()}
        rows.append(row)
    return csv_table(rows, ("kind", "prompt", "text", "seed", "file", "failed", "flags", last))


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes a report's files (name -> bytes) into its folder.

    Raises ValueError for a name that points outside the folder.
    """
    for name, data in files.items():
        path = safe_relative(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def prompts_csv(prompts: Sequence[PromptRow]) -> str:
    """Returns CSV with one row per prompt, with the mean scores in `score.*` columns."""
    rows = []
    for p in prompts:
        row: dict[str, Any] = {
            "prompt": p.prompt,
            "text": p.text,
            "plain": p.plain,
            "pictures": p.pictures,
            "failures": p.failures,
        }
        rows.append(row | {f"score.{k}": "" if v is None else v for k, v in p.scores.items()})
    return csv_table(rows, ("prompt", "text", "plain", "pictures", "failures"))


def save_report(report: Report, out: Path | str, overwrite: bool = False) -> Path:
    """Writes `report.json`, `pictures.csv`, `prompts.csv`, `index.html` and `pictures/`, either all of them or none.

    Raises ValueError if `out` exists and is not empty, unless `overwrite` is set.
    """
    with atomic_folder(out, overwrite) as folder:
        write_files(report.thumbs, folder)
        write_text(folder / REPORT_FILE, report.to_json())
        write_text(folder / "pictures.csv", made_csv(report.pictures, "nearest"))
        write_text(folder / "prompts.csv", prompts_csv(report.prompts))
        write_text(folder / HTML_FILE, report_html(report))
    return Path(out) / HTML_FILE
