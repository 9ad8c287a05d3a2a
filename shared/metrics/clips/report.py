"""The report of a clip evaluation, which is saved as JSON, CSV, clips and one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.io.safe_paths import safe_relative
from shared.metrics.report import REPORT_FILE, Instrument, MadeRow, Row, Score

SCHEMA_VERSION = 1
CLIPS = "clips"  # the folder that contains the clips
Kind = Literal["concept", "base", "unnamed"]
"""Clips with all concepts named in the prompt, clips without any concept, and clips with the motion loaded but
unnamed."""


class ClipRow(MadeRow):
    """One clip."""

    kind: Kind
    moves_like: str = ""  # the motion whose path is nearest to the clip's


class ClipCosts(Row):
    """Times in seconds, and memory and size in bytes. They are None if not measured."""

    seconds_per_clip: float | None = None
    base_seconds_per_clip: float | None = None
    training_seconds: float | None = None
    peak_memory: int | None = None
    peak_memory_of: str = ""  # "process" (resident) or "gpu"
    concept_bytes: int | None = None


class ClipReport(BaseModel):
    """The evaluation of a motion, a subject, or both, in clips. `files` (bytes by name) are saved outside the JSON."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = SCHEMA_VERSION
    medium: Literal["clips"] = "clips"
    motion: str = ""  # a concept's name; "" if no motion is judged
    subject: str = ""
    class_noun: str = ""
    recipes: dict[str, str] = {}  # concept -> the recipe it was learned with
    backbone: str = ""
    created: str = ""  # UTC, ISO 8601
    prompt_set: str = ""
    prompts: list[str] = []
    seeds: list[int] = []
    frames: int = 0
    fps: float = 8.0
    toybox: bool = False
    scores: list[Score] = []
    clips: list[ClipRow] = []
    motion_clips: list[str] = []  # the clips that the motion was learned from, relative to the report's folder
    references: list[str] = []  # the subject's pictures, relative to the report's folder
    candidates: list[str] = []  # the motions, including `motion` itself, among which it had to be recognized
    instruments: list[Instrument] = []
    costs: ClipCosts = ClipCosts()
    metadata: dict[str, Any] = {}  # the concepts' metadata, from their files
    notes: list[str] = []
    files: dict[str, bytes] = Field(default={}, exclude=True, repr=False)

    @property
    def name(self) -> str:
        return " with ".join(dict.fromkeys(n for n in (self.subject, self.motion) if n))

    def score(self, key: str) -> Score | None:
        """Returns the headline score with this key, or None if it was not measured."""
        return next((s for s in self.scores if s.key == key), None)

    def value(self, key: str) -> float | None:
        score = self.score(key)
        return None if score is None else score.value

    def of_kind(self, kind: Kind) -> list[ClipRow]:
        return [c for c in self.clips if c.kind == kind]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def load(path: Path | str, clips: bool = True) -> ClipReport:
        """Reads a report from its folder or JSON file. If `clips` is set, also reads its other files.

        Raises ValueError if the report is missing or damaged, is a report of pictures, or has another schema version.
        """
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        raw = _read(path)
        if raw.get("medium") != "clips":
            raise ValueError(f"{path} is not a report of clips")
        if raw.get("schema_version") != SCHEMA_VERSION:
            found = raw.get("schema_version")
            raise ValueError(f"{path} has schema version {found}; this program reads version {SCHEMA_VERSION}")
        try:
            report = ClipReport.model_validate(raw)
        except ValidationError as error:
            where = ".".join(str(p) for p in error.errors()[0]["loc"])
            raise ValueError(f"{path} is not a valid report: {where}: {error.errors()[0]['msg']}") from None
        named = [*report.motion_clips, *report.references, *(c.file for c in report.clips)] if clips else []
        for name in named:
            file = safe_relative(path.parent, name)
            if file.is_file():
                report.files[name] = file.read_bytes()
        return report


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no report found") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is not readable JSON") from None
    return raw if isinstance(raw, dict) else {}
