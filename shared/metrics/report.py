"""The report of an evaluation, which is saved as JSON, CSV, pictures and one self-contained HTML page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared.io.safe_paths import safe_relative
from shared.metrics.true_thing import TrueFigures

SCHEMA_VERSION = 2  # since version 2, identity means verification, and freedom is the third term
REPORT_FILE, HTML_FILE, PICTURES = "report.json", "index.html", "pictures"
# "freedom" pictures show the concept too. They are generated from additional seeds for the prompts that leave the pose
# open, and count only towards freedom.
Kind = Literal["concept", "freedom", "base", "drift", "drift_base"]
APART = 0.5  # if a smaller share of the true pictures passes verification, the thing is reported separately


class Row(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(extra="forbid")


class Score(Row):
    """One headline number. All its values share one unit; rates and scores are in [0, 1]."""

    key: str
    title: str
    value: float | None
    low: float | None = None  # 95% interval
    high: float | None = None
    unit: Literal["rate", "score", "cosine", "count", "share"] = "score"  # "share": a small fraction
    better: Literal["higher", "lower"] = "higher"
    base: float | None = None  # the floor: the value for the base model, prompted only with the class
    chance: float | None = None
    truth: float | None = None  # the value for true pictures of the thing, if they can be drawn
    among_low: float | None = None  # minimum and maximum over the references, each compared with the others
    among_high: float | None = None
    explanation: str = ""


#: The columns of a table of scores.
SCORE_COLUMNS = (
    "key", "title", "value", "low", "high", "unit", "better", "base", "chance", "truth", "among_low", "among_high",
)  # fmt: skip


class MadeRow(Row):
    """A picture or a clip, and everything measured on it."""

    prompt: int  # index into the report's prompts
    text: str  # as passed to the model
    seed: int
    file: str  # relative to the report's folder
    scores: dict[str, float | None] = {}
    expects: dict[str, str] = {}
    seen: dict[str, str] = {}  # attribute -> the value seen (in a clip, in most frames)
    flags: list[str] = []  # descriptions of what is wrong
    failed: bool = False

    @field_validator("scores", mode="before")
    @classmethod
    def _no_nan(cls, value: Mapping[str, Any]) -> dict[str, Any]:
        return {k: number(v) for k, v in value.items()}


class PictureRow(MadeRow):
    """One picture; for drift pictures, `prompt` is an index into the drift prompts."""

    kind: Kind
    nearest: str = ""


class PromptRow(Row):
    """Means over the pictures of one prompt, with and without the concept (`base_…`)."""

    prompt: int
    text: str
    plain: str
    pictures: int
    failures: int
    scores: dict[str, float | None] = {}


class Instrument(Row):
    """An instrument, and its accuracy on fresh renders if a card states it."""

    name: str
    measures: str
    toybox: bool = False
    accuracy: dict[str, float] = {}


class Costs(Row):
    """Times in seconds, and memory and size in bytes. They are None if not measured."""

    seconds_per_picture: float | None = None
    base_seconds_per_picture: float | None = None
    training_seconds: float | None = None
    peak_memory: int | None = None
    peak_memory_of: str = ""  # "process" (resident) or "gpu"
    concept_bytes: int | None = None


class Report(BaseModel):
    """The evaluation of one concept. `thumbs` (PNG bytes by file name) are saved as files, not in the JSON."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[2] = SCHEMA_VERSION
    name: str
    class_noun: str = ""
    recipe: str = ""
    backbone: str = ""
    created: str = ""  # UTC, ISO 8601
    prompt_set: str = ""
    seeds: list[int] = []
    toybox: bool = False
    scores: list[Score] = []
    prompts: list[PromptRow] = []
    pictures: list[PictureRow] = []
    references: list[str] = []  # files, relative to the report's folder
    instruments: list[Instrument] = []
    gallery: list[str] = []  # the look-alikes that the subject had to be told apart from
    copy_limits: dict[str, float] = {}
    truth: TrueFigures | None = None  # figures measured on true pictures of the thing, if they can be drawn
    costs: Costs = Costs()
    metadata: dict[str, Any] = {}  # the concept's metadata, from its file
    notes: list[str] = []  # caveats for the reader, such as missing instruments or a small gallery
    thumbs: dict[str, bytes] = Field(default={}, exclude=True, repr=False)

    def score(self, key: str) -> Score | None:
        """Returns the headline score with this key, or None if it was not measured."""
        return next((s for s in self.scores if s.key == key), None)

    def value(self, key: str) -> float | None:
        """Returns the value of a headline score, or None if it was not measured."""
        score = self.score(key)
        return None if score is None else score.value

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms of the trade-off. Freedom is one of them if its range was measured on true pictures."""
        free = self.truth is not None and self.truth.range is not None
        return ("identity", "text", "freedom") if free else ("identity", "text")

    @property
    def apart(self) -> bool:
        """Whether too few true pictures of this thing pass verification for its figures to be pooled."""
        identity = self.score("identity")
        return identity is not None and identity.truth is not None and identity.truth < APART

    def of_kind(self, kind: Kind) -> list[PictureRow]:
        return [p for p in self.pictures if p.kind == kind]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def load(path: Path | str, pictures: bool = True) -> Report:
        """Reads a report from its folder or JSON file. Raises ValueError if the report is missing or damaged, or has
        another schema version.
        """
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{path}: no report found") from None
        except (ValueError, RecursionError):
            raise ValueError(f"{path} is not readable JSON") from None
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version}; this program reads version {SCHEMA_VERSION}")
        try:
            report = Report.model_validate(raw)
        except ValidationError as error:
            where = ".".join(str(p) for p in error.errors()[0]["loc"])
            raise ValueError(f"{path} is not a valid report: {where}: {error.errors()[0]['msg']}") from None
        if pictures:
            for name in [*report.references, *(p.file for p in report.pictures)]:
                file = safe_relative(path.parent, name)
                if file.is_file():
                    report.thumbs[name] = file.read_bytes()
        return report


def number(value: Any) -> float | None:
    """Converts a finite value to a float and anything else to None, because JSON has neither NaN nor infinity."""
    if value is None:
        return None
    value = float(value)
    return value if math.isfinite(value) else None
