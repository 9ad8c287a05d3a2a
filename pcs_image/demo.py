"""The demo: five pictures of a held-out toybox subject become a concept, new scenes, scores and a page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pcs_image.runner import ImageRunner
from shared.evaluation.prompt_sets import load_prompts
from shared.io.contact_sheets import contact_sheet
from shared.io.decode import read_picture
from shared.io.outputs import check_output
from shared.io.resize import resize
from shared.recipe.resolve import load
from shared.runner.judging import EvaluationSettings, evaluate_loaded, score_line, training_scorers
from shared.runner.learn import personalize
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.toybox import reference_sets as album

_SCENES = 8


def run(
    out: Path, subject: str, recipe: str, overwrite: bool, bar: Callable[[], Any], counter: Callable[[], Any]
) -> Iterator[str]:
    """Do it, yielding what was made. ValueError for an unknown subject or recipe, or an `out` that exists."""
    check_output(out, overwrite)
    held = album.held_out(subject)
    name = f"my-{held.thing.class_name}"
    settings = [
        f"subject.images={out / 'references'}",
        f"subject.class_noun={held.thing.class_name}",
        f"output={out / name}.concept",
    ]
    resolved = load(recipe, settings)
    if out.exists():
        shutil.rmtree(out)
    start = time.perf_counter()
    files = album.write_album(subject, out / "references")
    yield f"references   {len(files)} pictures of {subject} in {out / 'references'}"
    planned = plan(resolved)
    runner = open_runner(ImageRunner, "toybox", [], "cpu")
    scorers = training_scorers(planned, runner.backbone, None, None)
    with bar() as progress:
        made = personalize(planned, runner, scorers=scorers, progress=progress)
    yield f"concept      {made[name]} ({time.perf_counter() - start:.0f} s)"
    with counter() as progress:
        settings = EvaluationSettings(
            "toybox", limit=10, references=out / "references", path=made[name], out=out / "report"
        )
        report = evaluate_loaded(runner, name, settings, progress)
    sheet = _sheet(report, out, held.thing.class_name)
    yield f"scenes       {sheet}"
    for score in report.scores:
        yield f"  {score.title:26} {score_line(score)}"
    (out / "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>pcs demo</title>'
        '<meta http-equiv="refresh" content="0; url=report/index.html">'
        '<a href="report/index.html">the report</a>'
    )
    yield f"page         {out / 'index.html'}"
    yield f"These are toy numbers, of the toybox. Done in {time.perf_counter() - start:.0f} s."


def _sheet(report: Any, out: Path, class_noun: str) -> Path:
    """references | new scenes | the base model without the concept, for the first prompts."""
    prompts = load_prompts("toybox").prompts[:_SCENES]

    def first(kind: str) -> torch.Tensor:
        pictures = [next(p for p in report.of_kind(kind) if p.prompt == i) for i in range(len(prompts))]
        return torch.stack([resize(read_picture(out / "report" / r.file), 64).pixels for r in pictures])

    references = torch.stack([resize(read_picture(p), 64).pixels for p in sorted((out / "references").glob("*.png"))])
    path = out / "contact-sheet.png"
    contact_sheet(
        {
            "references": references,
            "with the concept": first("concept"),
            f"base model, told only “{class_noun}”": first("base"),
        }
    ).save(path)
    return path
