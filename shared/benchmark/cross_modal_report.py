"""The report of `pcs concept evaluate`. Its table has one line per modality and is saved as JSON, CSV and a web page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from shared.benchmark.comparison_table import cell
from shared.concept import Concept
from shared.evaluation.picture_rows import pngs
from shared.io.outputs import write_text
from shared.metrics.clips.page import inline_clip
from shared.metrics.encoders import Instruments
from shared.metrics.html import formatted, inline, render, seconds
from shared.metrics.report import HTML_FILE, REPORT_FILE, Instrument, Row, Score
from shared.metrics.save_report import csv_table
from shared.runner.judging import references
from shared.types import Subject

CSV_FILE, SHOTS_FILE, REFERENCES = "report.csv", "shots.csv", "references"
SCHEMA_VERSION = 1
_SIDE = 128  # side length of the references on the page, in pixels
TITLES = {"image": "Pictures", "video": "Clips", "3d": "Asset"}


class ModalityRow(Row):
    """One line of the table."""

    name: str
    made: int = 0  # number of pictures, clips or assets
    frames: int = 0  # frames per picture, clip or asset
    prompts: list[str] = []  # as passed to the model
    scores: list[Score] = []
    seconds_each: float | None = None
    failed: str = ""  # the error, if any

    @property
    def title(self) -> str:
        return TITLES.get(self.name, self.name)

    def score(self, key: str) -> Score | None:
        """Returns the score with this key, or None if it was not measured."""
        return next((s for s in self.scores if s.key == key), None)


class ShotRow(Row):
    """One generated picture, clip or asset, with scores averaged over its frames."""

    modality: str
    text: str
    seed: int
    file: str = ""  # relative to the report's folder
    more: dict[str, str] = {}  # link text -> file
    scores: dict[str, float | None] = {}


class CrossModalReport(BaseModel):
    """The evaluation of one concept in several modalities."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    medium: Literal["cross-modal"] = "cross-modal"
    name: str
    class_noun: str = ""
    recipe: str = ""
    backbone: str = ""
    created: str = ""  # UTC, ISO 8601
    toybox: bool = False
    modalities: list[ModalityRow] = []
    shots: list[ShotRow] = []
    references: list[str] = []  # files, relative to the report's folder
    instruments: list[Instrument] = []

    @property
    def columns(self) -> list[Score]:
        """Every score that at least one modality has, in reading order."""
        found: dict[str, Score] = {}
        for score in (s for m in self.modalities for s in m.scores):
            found.setdefault(score.key, score)
        order = [s.key for m in sorted(self.modalities, key=lambda m: -len(m.scores)) for s in m.scores]
        return [found[key] for key in dict.fromkeys(order)]

    @property
    def failures(self) -> dict[str, str]:
        return {m.name: m.failed for m in self.modalities if m.failed}

    @property
    def notes(self) -> list[str]:
        """The caveats that a reader needs to interpret the table."""
        out = []
        if not any(m.score("identity") for m in self.modalities):
            out.append(
                "There are no true pictures of this subject to verify its identity against, so the table shows its "
                "likeness to the references instead."
            )
        if any(m.name == "3d" for m in self.modalities):
            out.append("An asset's prompt names only the subject, and the scores of a single asset have no interval.")
        return out

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def markdown(self) -> str:
        """Returns a Markdown table with one line per modality, ready for a README."""
        head = ["modality", "made", *(s.title for s in self.columns), "time for one"]
        lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        for m in self.modalities:
            cells = [cell(m.score(s.key)) for s in self.columns]
            made = "failed" if m.failed else str(m.made)
            lines.append("| " + " | ".join([m.title, made, *cells, seconds(m.seconds_each)]) + " |")
            if any(s.base is not None for s in m.scores):
                floor = [formatted(s.base, s.unit) if (s := m.score(c.key)) else "–" for c in self.columns]
                lines.append("| " + " | ".join([f"{m.title}, without the concept", "", *floor, ""]) + " |")
        notes = ["Toy numbers: generated and evaluated on the toybox."] if self.toybox else []
        return "\n".join(lines) + "\n" + "".join(f"\n{note}\n" for note in [*notes, *self.notes])

    def csv(self) -> str:
        """Returns CSV with one line per modality, at full precision. The cells of unmeasured scores are empty."""
        rows = []
        for m in self.modalities:
            row: dict[str, Any] = {"modality": m.name, "made": m.made, "frames": m.frames, "error": m.failed}
            row["seconds_each"] = "" if m.seconds_each is None else m.seconds_each
            for s in m.scores:
                named = {"": s.value, ".low": s.low, ".high": s.high, ".base": s.base, ".truth": s.truth}
                row |= {f"{s.key}{end}": "" if v is None else v for end, v in named.items()}
            rows.append(row)
        return csv_table(rows, ("modality", "made", "frames", "seconds_each", "error"))

    def shots_csv(self) -> str:
        """Returns CSV with one line per picture, clip or asset."""
        rows = []
        for shot in self.shots:
            row: dict[str, Any] = {"modality": shot.modality, "text": shot.text, "seed": shot.seed, "file": shot.file}
            rows.append(row | {f"score.{k}": "" if v is None else v for k, v in shot.scores.items()})
        return csv_table(rows, ("modality", "text", "seed", "file"))


def report_of(
    concept: Concept, rows: Sequence[ModalityRow], shots: Sequence[ShotRow], tools: Instruments
) -> CrossModalReport:
    """Builds the report without its references, which `save_cross_modal` adds."""
    meta = concept.meta
    return CrossModalReport(
        name=meta.name,
        class_noun=meta.class_noun,
        recipe=meta.learned_with.method,
        backbone=meta.backbone.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        toybox=tools.toybox,
        modalities=list(rows),
        shots=list(shots),
        instruments=[
            Instrument(name=i.name, measures=i.measures, toybox=i.toybox, accuracy=dict(i.accuracy))
            for i in tools.infos()
        ],
    )


def save_cross_modal(report: CrossModalReport, subject: Subject, folder: Path) -> CrossModalReport:
    """Writes `report.json`, `report.csv`, `shots.csv`, the references and `index.html` into `folder`, which already
    contains the generated files. Returns the report as written."""
    (folder / REFERENCES).mkdir()
    names = []
    for i, png in enumerate(pngs(references(subject, _SIDE))):
        names.append(f"{REFERENCES}/{i:02d}.png")
        (folder / names[-1]).write_bytes(png)
    report = report.model_copy(update={"references": names})
    write_text(folder / REPORT_FILE, report.to_json())
    write_text(folder / CSV_FILE, report.csv())
    write_text(folder / SHOTS_FILE, report.shots_csv())
    write_text(folder / HTML_FILE, page(report, folder))
    return report


def page(report: CrossModalReport, folder: Path) -> str:
    """Renders a self-contained page with the table, the pictures, the animated clips and the rotating asset."""
    return render(
        "cross_modal.html.j2",
        report=report,
        columns=report.columns,
        references=[inline((folder / name).read_bytes()) for name in report.references],
        tiles={m.name: [_tile(s, folder) for s in report.shots if s.modality == m.name] for m in report.modalities},
    )


def _tile(shot: ShotRow, folder: Path) -> Mapping[str, Any]:
    data = (folder / shot.file).read_bytes() if shot.file else None
    moves = shot.file.endswith(".webp")
    return {"shot": shot, "src": inline_clip(data) if moves and data else inline(data), "moves": moves}
