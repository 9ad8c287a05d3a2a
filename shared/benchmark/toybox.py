"""Compares recipes on the toybox's held-out subjects. The README's table comes from this benchmark."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.backbones import load_backbone
from shared.benchmark.aggregate import Goal
from shared.benchmark.comparison_table import Comparison
from shared.benchmark.experiment import Experiment, benchmark, check_benchmark, pictures
from shared.benchmark.variants import Variant, varied
from shared.concept import read
from shared.config import expanded, unknown
from shared.evaluation.evaluate import KeptPictures
from shared.metrics.report import Report
from shared.metrics.toybox import CALIBRATION
from shared.recipe.catalog import recipe_files
from shared.recipe.reads import paths_read
from shared.recipe.resolve import load
from shared.recipe.schema import Recipe, dump
from shared.runner.base import Runner
from shared.runner.judging import EvaluationSettings, training_scorers
from shared.runner.learn import personalize
from shared.runner.plan import Plan, plan
from shared.toybox import reference_sets as album
from shared.toybox.evaluators.convnet import WEIGHTS
from shared.toybox.subjects import subjects as held_out
from shared.toybox.weights import backbone_path
from shared.train.device import pick_device

_YAML = (".yaml", ".yml")
#: The maximum number of subjects in a benchmark.
MOST = 10_000
#: Recipe keys that contain paths. They are not compared, because paths are removed when a concept is saved.
_PLACES = ("subject", "output", "backbone")
#: The project's own targets. A picture that copies a reference counts as a failure.
GOAL = Goal(identity=0.70, over_floor=0.40, background=0.80)


@dataclass(frozen=True)
class BenchmarkSettings:
    """The settings of a benchmark on the toybox."""

    split: str = "development"  # split of the toybox's held-out things; use "reporting" only once, at the end
    subjects: int | tuple[str, ...] = 4  # number of subjects (the first N of the split), or their names
    limit: int = 10  # number of prompts
    num: int = 2  # pictures per prompt
    out: Path = Path("benchmark")
    device: str | None = None  # None means the GPU if there is one
    overrides: tuple[str, ...] = ()  # key=value applied to every recipe
    grid: tuple[str, ...] = ()  # key=value,value; every recipe runs with every combination
    control: str | None = None  # the row with which all others are compared, subject by subject


def run(kind: type[Runner], recipes: Sequence[str], settings: BenchmarkSettings) -> Comparison:
    """Learns the split's subjects with every recipe, then generates and scores pictures of them.

    Raises ValueError for an unknown recipe or split. Resumes where an earlier call with the same arguments stopped.

    recipes: names of shipped recipes, or files; if empty, all shipped recipes
    """
    chosen = varied(named(recipes or list(recipe_files("image"))), settings.overrides, settings.grid)
    # Resolve every recipe now, so that a wrong setting fails before any cell runs.
    resolved = {name: load(v.recipe, v.overrides) for name, v in chosen.items()}
    contents = {name: dump(recipe) for name, recipe in resolved.items()}
    if settings.control is not None and settings.control not in chosen:
        raise ValueError(unknown(settings.control, chosen, "control"))
    things = chosen_things(settings.split, settings.subjects)
    check_place(settings.out, recipes, resolved.values())
    runner = kind(load_backbone("toybox", device=pick_device(settings.device)))
    experiment = Experiment(
        contents,
        things,
        "toybox",
        range(settings.num),
        {"limit": settings.limit, "checkpoint": runner.backbone.checkpoint, "evaluators": evaluators()},
    )

    base: dict[str, KeptPictures] = {}

    def cell(recipe: str, subject: str, workdir: Path) -> Report:
        report = _cell(runner, chosen[recipe], subject, workdir, settings, base)
        return report.model_copy(update={"recipe": recipe})  # its name in the table

    reporting = pictures(GOAL, settings.control)
    return benchmark(cell, experiment, settings.out, reporting, progress=say)


def check_place(out: Path, recipes: Iterable[str], resolved: Iterable[Recipe], more: Iterable[Path] = ()) -> None:
    """Checks the folder `out` before a model is loaded.

    Raises ValueError if a benchmark can be neither started nor resumed in `out`, or if `out` overlaps with an input. Inputs
    are recipe files, files that the recipes read, the toybox's weights, and the paths in `more`.
    """
    files = [expanded(recipe) for recipe in recipes if recipe.endswith(_YAML)]
    check_benchmark(
        out, [*files, *(path for recipe in resolved for path in paths_read(recipe)), backbone_path(), *more]
    )


def count_or_names(text: str, option: str = "--subjects", least: int = 1) -> int | tuple[str, ...]:
    """Parses a number such as "4", or names such as "development-mug,development-duck". Raises ValueError, naming the option,
    for a number outside the range from `least` to `MOST`, or for an empty name."""
    names = tuple(name.strip() for name in text.split(","))
    if len(names) == 1 and names[0].lstrip("-").isdigit():
        if not least <= int(names[0]) <= MOST:
            raise ValueError(f"{option} {text}: give a number from {least} to {MOST:,}, or names separated by commas")
        return int(names[0])
    if not all(names):
        raise ValueError(f"{option} {text!r}: give a number, or names separated by commas")
    return names


def chosen_things(split: str, subjects: int | Sequence[str]) -> list[str]:
    """Returns the first `subjects` held-out things of a split, or those that `subjects` lists by name. Raises ValueError
    for an unknown split or name."""
    return chosen_of("subject", split, lambda: [h.name for h in held_out(split)], subjects)


def chosen_of(what: str, split: str, names: Callable[[], list[str]], chosen: int | Sequence[str]) -> list[str]:
    """Returns the first `chosen` names of a split, or the names listed in `chosen`. Raises ValueError for an unknown split or
    name."""
    if split not in album.SPLITS:
        raise ValueError(unknown(split, album.SPLITS, "split"))
    if isinstance(chosen, int):
        return names()[:chosen]
    for name in chosen:
        if name not in names():
            raise ValueError(unknown(name, names(), f"{what} of the {split} split"))
    return list(dict.fromkeys(chosen))


def say(*what: str) -> None:
    """Prints a benchmark's progress on standard error."""
    print(*what, file=sys.stderr, flush=True)


def named(recipes: Sequence[str]) -> dict[str, str]:
    """Maps each recipe's name in the table (for a file, its stem) to the recipe. Raises ValueError if two recipes would
    have the same name."""
    out: dict[str, str] = {}
    for recipe in recipes:
        name = Path(recipe).stem if recipe.endswith(_YAML) else recipe
        if name in out:
            raise ValueError(
                f"recipes: {out[name]} and {recipe} would both be called {name!r} in the table; rename one of the files"
            )
        out[name] = recipe
    return out


def _cell(
    runner: Runner,
    variant: Variant,
    subject: str,
    workdir: Path,
    settings: BenchmarkSettings,
    base: dict[str, KeptPictures],
) -> Report:
    held = album.held_out(subject)
    album.write_album(subject, workdir / "references", overwrite=True)
    concept = workdir / "subject.concept"
    subject_overrides = [
        f"subject.images={workdir / 'references'}",
        f"subject.class_noun={held.thing.class_name}",
        f"output={concept}",
    ]
    planned = plan(load(variant.recipe, [*variant.overrides, *subject_overrides]), overwrite=True)
    if not learned_before(concept, planned, runner):
        scorers = training_scorers(planned, runner.backbone, None, None)
        personalize(planned, runner, overwrite=True, scorers=scorers)
    name = next(iter(planned.subjects))
    judged = EvaluationSettings(
        "toybox",
        tuple(range(settings.num)),
        settings.limit,
        references=workdir / "references",
        path=concept,
        out=workdir / "report",
        overwrite=True,
        base=base,
    )
    try:
        return runner.evaluate(name, judged)
    finally:
        runner.unload(name)


def learned_before(concept: Path, planned: Plan, runner: Runner) -> bool:
    """Loads the concept if an earlier call learned it with the same recipe on the same model, so that it only has to be
    scored again. Returns whether the concept was loaded."""
    if not concept.is_dir():
        return False
    kept = read(concept)
    then, now = kept.meta.recipe, dump(planned.recipe)
    same = all(then.get(key) == value for key, value in now.items() if key not in _PLACES)
    if not same or kept.meta.backbone.checkpoint != runner.backbone.checkpoint:
        return False
    runner.load(kept)
    return True


def learned(runner: Runner, recipe: Recipe, concept: Path) -> str:
    """Loads a concept, learning it first unless an earlier call did. Returns its name."""
    concept.parent.mkdir(parents=True, exist_ok=True)
    planned = plan(recipe, overwrite=True)
    if not learned_before(concept, planned, runner):
        scorers = runner.scorers(planned, runner.backbone, None, None)
        personalize(planned, runner, overwrite=True, scorers=scorers)
    return next(iter(planned.subjects))


@dataclass(frozen=True)
class Things:
    """The concepts of held-out things in a benchmark's folder. Each is learned once from pictures, and all recipes share it."""

    out: Path
    recipe: str  # the recipe that learns things from pictures
    overrides: tuple[str, ...] = ()  # key=value applied on top of `recipe`
    modality: str = "image"  # the modality of `recipe`
    model: type[Recipe] = Recipe

    def references(self, thing: str) -> Path:
        """Returns the folder for the thing's pictures."""
        return self.out / "references" / thing

    def concept(self, thing: str) -> Path:
        """Returns the folder for the thing's concept."""
        return self.out / "subjects" / f"{thing}.concept"

    def learned(self, painter: Runner, thing: str) -> str:
        """Learns the thing if needed and loads it into `painter`. Returns the concept's name."""
        album.write_album(thing, self.references(thing), overwrite=True)
        noun = album.held_out(thing).thing.class_name
        places = [f"subject.images={self.references(thing)}", f"subject.class_noun={noun}"]
        places.append(f"output={self.concept(thing)}")
        recipe = load(self.recipe, [*self.overrides, *places], self.modality, self.model)
        return learned(painter, recipe, self.concept(thing))


def evaluators() -> str:
    """Returns a hash of the evaluators' weights and calibration. Scores from different evaluators cannot share a table."""
    digest = hashlib.sha256()
    for path in sorted([*WEIGHTS.glob("*/model.safetensors"), *WEIGHTS.glob(CALIBRATION)]):
        digest.update(path.parent.name.encode() + path.read_bytes())
    return digest.hexdigest()
