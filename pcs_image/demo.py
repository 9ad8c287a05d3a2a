"""The picture part of the demo. It learns the subject as a concept, and shows new scenes, scores and a report."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pcs_image.runner import ImageRunner
from shared.demo import Asked, Bars, Exhibit
from shared.io.contact_sheets import contact_sheet, write_picture
from shared.io.decode import read_picture
from shared.io.resize import resize
from shared.recipe.resolve import load
from shared.runner.judging import EvaluationSettings, evaluate_loaded, score_line, training_scorers
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan

_SCENES = 8


def check(asked: Asked) -> None:
    """Raises ValueError if the subject or the recipe is unknown."""
    load(asked.recipe, _settings(asked))


def show(asked: Asked, bars: Bars) -> Iterator[str | Exhibit]:
    """Learns the subject, evaluates the concept, and shows its pictures next to the base model's."""
    start, noun = time.perf_counter(), asked.thing.thing.class_name
    planned = plan(load(asked.recipe, _settings(asked)))
    runner = open_runner(ImageRunner, "toybox", [], "cpu")
    scorers = training_scorers(planned, runner.backbone, None, None)
    with bars.bar() as progress:
        personalize(planned, runner, scorers=scorers, progress=progress)
    yield f"concept      {asked.concept} ({time.perf_counter() - start:.0f} s)"
    page = asked.out / "report" / "index.html"
    with bars.counter() as progress:
        judged = EvaluationSettings(
            "toybox", limit=10, references=asked.references, path=asked.concept, out=page.parent
        )
        report = evaluate_loaded(runner, asked.concept.stem, judged, progress)
    sheet = _sheet(report, asked, noun)
    yield f"scenes       {sheet}"
    scores = [(score.title, score_line(score)) for score in report.scores]
    yield from (f"  {title:26} {line}" for title, line in scores)
    text = f"Learned with {asked.recipe} from the pictures above, none of which shows these scenes."
    made = _first(report, asked, "concept")
    yield Exhibit("New pictures", sheet, text, scores, {"the report": page}, made)


def _settings(asked: Asked) -> list[str]:
    noun = asked.thing.thing.class_name
    return [f"subject.images={asked.references}", f"subject.class_noun={noun}", f"output={asked.concept}"]


def _first(report: Any, asked: Asked, kind: str) -> torch.Tensor:
    """Returns the first picture for each of the first `_SCENES` prompts, as a batch [N, 3, 64, 64]."""
    found = [next(p for p in report.of_kind(kind) if p.prompt == i) for i in range(_SCENES)]
    return torch.stack([resize(read_picture(asked.out / "report" / r.file), 64).pixels for r in found])


def _sheet(report: Any, asked: Asked, class_noun: str) -> Path:
    """Writes a contact sheet with the references and, for the first prompts, the pictures made with the concept and
    those made by the base model."""
    references = torch.stack([resize(read_picture(p), 64).pixels for p in sorted(asked.references.glob("*.png"))])
    rows = {
        "references": references,
        "with the concept": _first(report, asked, "concept"),
        f"base model, prompted with “{class_noun}”": _first(report, asked, "base"),
    }
    return write_picture(contact_sheet(rows), asked.out / "contact-sheet.png")
