"""Recipes compared on the toybox's held-out subjects: what the table in the README is made by."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pcs_image import scoring, tasks
from pcs_image.compare import benchmark
from pcs_image.pool import Goal
from pcs_image.runner import Runner
from pcs_image.table import Comparison
from shared.backbones import load_backbone
from shared.catalog import recipe_files
from shared.config import unknown
from shared.metrics.report import Report
from shared.recipes import load
from shared.toybox import album
from shared.toybox.subjects import subjects as held_out

#: The figures that the project sets itself (a copy counts as a failure).
GOAL = Goal(identity=0.70, over_floor=0.40, background=0.80)


def run(
    recipes: Sequence[str] | None,
    split: str,
    subjects: int,
    limit: int,
    num: int,
    out: Path,
    device: str | None = None,
    given: Sequence[str] = (),
) -> Comparison:
    """Learn, generate and score every recipe on the split's first `subjects`; `given` settings go on every recipe.

    Raises ValueError for an unknown recipe or split. Goes on where an earlier call with the same arguments stopped.
    """
    known = recipe_files("image")
    for recipe in recipes or known:
        if recipe not in known:
            raise ValueError(unknown(recipe, known, "recipe"))
        load(recipe, list(given))  # a wrong setting is an error now, not a failed cell
    if split not in album.SPLITS:
        raise ValueError(unknown(split, album.SPLITS, "split"))
    names = [h.name for h in held_out(split)][:subjects]
    chosen = list(recipes or known)
    runner = Runner(load_backbone("toybox", device=device or tasks.best_device()))

    def cell(recipe: str, subject: str, workdir: Path) -> Report:
        return _cell(runner, recipe, subject, workdir, range(num), limit, given)

    return benchmark(
        cell,
        chosen,
        names,
        "toybox",
        list(range(num)),
        out,
        settings={"limit": limit, "checkpoint": runner.backbone.checkpoint, "given": list(given)},
        goal=GOAL,
        progress=lambda *what: print(*what, file=sys.stderr, flush=True),
    )


def _cell(
    runner: Runner, recipe: str, subject: str, workdir: Path, seeds: Sequence[int], limit: int, given: Sequence[str]
) -> Report:
    held = album.held_out(subject)
    album.write_album(subject, workdir / "references", overwrite=True)
    concept = workdir / "subject.concept"
    own = [
        f"subject.images={workdir / 'references'}",
        f"subject.class_noun={held.thing.class_name}",
        f"output={concept}",
    ]
    planned = tasks.plan(load(recipe, [*given, *own]), overwrite=True)
    scorers = scoring.training_scorers(planned, runner.backbone, None, None)
    made = tasks.personalize(planned, runner, overwrite=True, scorers=scorers)
    name = next(iter(made))
    try:
        return scoring.evaluate_concept(
            runner, concept, "toybox", workdir / "report", references=workdir / "references", seeds=seeds, limit=limit,
            overwrite=True,
        )  # fmt: skip
    finally:
        runner.unload(name)
