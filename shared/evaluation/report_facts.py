"""Collects what a report states besides scores: instruments, costs, and notes."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.evaluation.prompt_sets import PromptSet
from shared.metrics.encoders import Instruments
from shared.metrics.report import APART, SCORE_COLUMNS, Costs, Instrument, Report
from shared.metrics.scorer import Scorer
from shared.metrics.true_thing import TrueThing
from shared.train.costs import peak_memory

SMALL_GALLERY = 8


@dataclass(frozen=True)
class Case:
    """The concept to evaluate, and what is known about its subject."""

    name: str  # `<name>` in prompts
    class_noun: str
    references: Tensor  # [R, 3, H, W] in [-1, 1]
    masks: Tensor | None = None  # [R, H, W] in [0, 1]; the subject in each reference, if there are masks
    gallery: Mapping[str, Tensor] | None = None  # name -> look-alikes of the same class [n, 3, H, W]
    fresh: Tensor | None = None  # [F, 3, H, W]; pictures of the subject other than the references (new renders)
    # the model's autoencoder; pictures that are compared with generated ones are first passed through it
    through: Callable[[Tensor], Tensor] | None = None
    through_key: str = ""  # the autoencoder's fingerprint, if measurements through it may be cached
    true: TrueThing | None = None  # the real subject, if a world can draw it
    cache: Path | None = None  # a folder for measurements of true pictures; if None, nothing is cached
    concept: Path | None = None  # the concept's folder, whose size on disk is reported
    recipe: str = ""
    backbone: str = ""
    kind: str = "subject"  # or "style", which has no true pictures
    toy: bool = False  # whether a model of a toy world generates the pictures
    training_seconds: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


def about(case: Case, instruments: Instruments, scorer: Scorer) -> dict[str, Any]:
    """Returns the fields of a report that state what was evaluated, and with which instruments."""
    limits = scorer.limits
    return {
        "name": case.name,
        "class_noun": case.class_noun,
        "recipe": case.recipe,
        "backbone": case.backbone,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "toybox": instruments.toybox or case.toy,
        "gallery": list(case.gallery or {}),
        "copy_limits": {"pixel": limits.pixel, "embed": limits.embed, "calibrated_on": float(limits.calibrated_on)},
        "truth": scorer.figures,
        "metadata": dict(case.metadata),
        "instruments": [
            Instrument(name=i.name, measures=i.measures, toybox=i.toybox, accuracy=dict(i.accuracy))
            for i in instruments.infos()
        ],
    }


def costs(case: Case, seconds: float, base_seconds: float) -> Costs:
    """Returns the costs of a picture and of the concept. `seconds` and `base_seconds` are per picture."""
    gpu = torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0
    peak, of = peak_memory(torch.device("cuda" if gpu else "cpu"))
    size = None
    if case.concept is not None and case.concept.exists():
        files = [case.concept] if case.concept.is_file() else [p for p in case.concept.rglob("*") if p.is_file()]
        size = sum(p.stat().st_size for p in files)
    return Costs(
        seconds_per_picture=seconds,
        base_seconds_per_picture=base_seconds,
        training_seconds=case.training_seconds,
        peak_memory=peak,
        peak_memory_of=of,
        concept_bytes=size,
    )


def notes(case: Case, scorer: Scorer, prompts: PromptSet, seeds: Sequence[int]) -> list[str]:
    """Returns the caveats that a reader needs to interpret the scores."""
    instruments = scorer.instruments
    out = _of_identity(case, scorer)
    if instruments.text_image is None:
        out.append("No CLIP model was given, so how well the prompt was followed is not measured.")
    if instruments.attributes is None and any(p.expects for p in prompts.prompts):
        out.append(
            "No recognizer was given, so whether pictures show the prompts' backgrounds, views and styles is not checked."
        )
    if not prompts.drift:
        out.append("The prompt set has no drift prompts, so whether the concept changes other things is not measured.")
    if len(seeds) < 2:
        out.append("With one seed per prompt, diversity is not measured.")
    if len(case.references) < 2 and case.fresh is None:
        out.append("With only one reference, the copy limits are defaults instead of calibrated values.")
    return out


def _of_identity(case: Case, scorer: Scorer) -> list[str]:
    out = []
    if case.gallery and len(case.gallery) < SMALL_GALLERY:
        count = f"{len(case.gallery)} look-alike" + ("" if len(case.gallery) == 1 else "s")
        out.append(f"The gallery has only {count}, so recognition is easier than among many look-alikes.")
    if not case.gallery:
        out.append(
            "No gallery of look-alikes was given, so identity means likeness to the references instead of recognition among "
            "look-alikes."
        )
    if scorer.figures is None or scorer.figures.range is None:
        out.append(
            f"The trade-off has only two terms, because {_why_two(case, scorer)}. Instead of freedom, compare diversity with "
            "the base model's."
        )
    if scorer.verifier.has_faces:
        out.append(
            "Identity is judged only where a face can be seen. Pictures without a face (from behind or from above) are "
            "reported separately, and count as failures unless the prompt asks for such a view."
        )
    return out


def _why_two(case: Case, scorer: Scorer) -> str:
    if case.kind == "style":
        return "a style has no pose"
    if case.true is None:
        return "there are no true pictures of this subject to compare poses with"
    if scorer.instruments.attributes is None or scorer.instruments.locator is None:
        return "without a recognizer, the subject cannot be located in pictures"
    if scorer.chance is None:
        return "without look-alikes, nothing can be verified"
    return "no prompt leaves the pose open, or too few true pictures of the subject are verified"


def truth_note(report: Report) -> str | None:
    """Returns a note on how many true pictures of the subject pass verification, or None if none were drawn."""
    identity = report.score("identity")
    if report.truth is None or identity is None or identity.truth is None:
        return None
    pictures = sum(b.pictures for b in report.truth.bars.values())
    text = f"Of {pictures} true pictures of the subject drawn for these prompts, {identity.truth:.0%} pass verification"
    if identity.truth < APART:
        return f"{text}. That is too few to compare scores between subjects."
    return f"{text}. Identity is measured relative to that share."


def scores_csv(report: Report) -> str:
    """Returns CSV text with one headline score or cost per row. Cells are empty where nothing was measured."""
    out = io.StringIO()
    writer: Any = csv.DictWriter(out, SCORE_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: v for k, v in s.model_dump().items() if k in SCORE_COLUMNS and v is not None} for s in report.scores
    )
    costs = report.costs.model_dump(exclude={"peak_memory_of"})
    units = {"seconds": "seconds", "memory": "bytes", "bytes": "bytes"}
    for key, value in costs.items():
        unit = next(u for word, u in units.items() if word in key)
        row = {"key": key, "title": key.replace("_", " "), "value": value, "unit": unit, "better": "lower"}
        writer.writerow({k: v for k, v in row.items() if v is not None})
    return out.getvalue()
