"""Recipes compared on the toybox's held-out subjects: what the table in the README is made by."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from shared.backbones import load_backbone
from shared.benchmark.aggregate import Goal
from shared.benchmark.compare import benchmark
from shared.benchmark.comparison import Comparison
from shared.concept import read
from shared.config import unknown
from shared.metrics.report import Report
from shared.recipe.catalog import recipe_files
from shared.recipe.resolve import dump, load
from shared.runner.base import Runner
from shared.runner.judging import EvaluationSettings, training_scorers
from shared.runner.learn import personalize
from shared.runner.opening import best_device
from shared.runner.plan import Plan, plan
from shared.toybox import reference_sets as album
from shared.toybox.evaluators.convnet import WEIGHTS
from shared.toybox.subjects import subjects as held_out

#: What a concept says of its recipe without the folders of the machine it was learned on.
_PLACES = ("subject", "output", "backbone")
#: The figures that the project sets itself (a copy counts as a failure).
GOAL = Goal(identity=0.70, over_floor=0.40, background=0.80)


def run(
    kind: type[Runner],
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
    contents = {}
    for recipe in recipes or known:
        if recipe not in known:
            raise ValueError(unknown(recipe, known, "recipe"))
        contents[recipe] = dump(load(recipe, list(given)))  # a wrong setting is an error now, not a failed cell
    if split not in album.SPLITS:
        raise ValueError(unknown(split, album.SPLITS, "split"))
    names = [h.name for h in held_out(split)][:subjects]
    chosen = list(recipes or known)
    runner = kind(load_backbone("toybox", device=device or best_device()))

    def cell(recipe: str, subject: str, workdir: Path) -> Report:
        return _cell(runner, recipe, subject, workdir, range(num), limit, given)

    return benchmark(
        cell,
        chosen,
        names,
        "toybox",
        list(range(num)),
        out,
        settings={"limit": limit, "checkpoint": runner.backbone.checkpoint, "evaluators": evaluators()},
        contents=contents,
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
    planned = plan(load(recipe, [*given, *own]), overwrite=True)
    if not _learned(concept, planned, runner):
        scorers = training_scorers(planned, runner.backbone, None, None)
        personalize(planned, runner, overwrite=True, scorers=scorers)
    name = next(iter(planned.subjects))
    settings = EvaluationSettings(
        "toybox", tuple(seeds), limit, references=workdir / "references", path=concept, out=workdir / "report",
        overwrite=True,
    )  # fmt: skip
    try:
        return runner.evaluate(name, settings)
    finally:
        runner.unload(name)


def _learned(concept: Path, planned: Plan, runner: Runner) -> bool:
    """Whether an earlier call left this very concept, to be scored anew; it is loaded then."""
    if not concept.is_dir():
        return False
    found = read(concept)
    then, now = found.meta.recipe, dump(planned.recipe)
    same = all(then.get(key) == value for key, value in now.items() if key not in _PLACES)
    if not same or found.meta.backbone.checkpoint != runner.backbone.checkpoint:
        return False
    runner.load(found)
    return True


def evaluators() -> str:
    """A hash of the evaluators' weights: numbers of different instruments do not belong in one table."""
    digest = hashlib.sha256()
    for path in sorted(WEIGHTS.glob("*/model.safetensors")):
        digest.update(path.parent.name.encode() + path.read_bytes())
    return digest.hexdigest()
