"""Recipes of assets compared on the toybox's held-out things, each learned from its pictures once for all recipes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pcs_3d.assets import ABOUT, AssetFiles, create
from pcs_3d.benchmark.asset_cell import AssetCell
from pcs_3d.benchmark.asset_rows import AssetGoal
from pcs_3d.benchmark.asset_table import ASSET, PLAIN, PLAIN_REPORT, REPORT, AssetComparison, assets
from pcs_3d.distill.hand_over import check_fields
from pcs_3d.evaluation.asset_files import read_judged
from pcs_3d.evaluation.asset_report import AssetReport
from pcs_3d.evaluation.evaluate import measure
from pcs_3d.evaluation.save_asset_report import save_asset_report
from pcs_3d.evaluation.yardstick import Against, Yardstick
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.backbones import load_backbone
from shared.benchmark.experiment import Experiment, benchmark
from shared.benchmark.toybox import Things, evaluators, named, say
from shared.concept import read
from shared.config import unknown
from shared.io.outputs import write_text
from shared.metrics.scorer import fill
from shared.recipe.resolve import load
from shared.recipe.schema import dump
from shared.toybox import reference_sets as album
from shared.toybox.subjects import subjects as held_out
from shared.train import checkpoint
from shared.train.device import pick_device

RECIPES = ("texture_refinement", "hifa", "dreamfusion", "prolificdreamer", "lucid_dreamer")
#: The figures that the project sets itself.
GOAL = AssetGoal(identity=0.50, view=0.65, iou=0.55)


@dataclass(frozen=True)
class AssetBenchmarkSettings:
    """What is compared, on how much, and where it is kept."""

    split: str = "development"  # of the held-out things; "reporting" once, at the end
    subjects: int = 4  # the first of the split
    learn: str = "t_lora"  # how things are learned, from pictures
    prompt: str = "a photo of a {concept}"
    out: Path = Path("benchmark")
    device: str | None = None  # None: the GPU where there is one
    overrides: tuple[str, ...] = ()  # key=value laid on every recipe for assets
    learn_overrides: tuple[str, ...] = ()  # key=value laid on the recipe for pictures


def run(recipes: Sequence[str], settings: AssetBenchmarkSettings) -> AssetComparison:
    """Learn, make and score every recipe for assets (shipped names and files of one's own; none: `RECIPES`) on the split's
    things, each with the concept and, told only the class, without it.

    Raises ValueError for an unknown recipe or split, and for recipes that cannot make an asset of a prompt and a concept
    alone. Goes on where an earlier call with the same arguments stopped.
    """
    chosen = named(recipes or RECIPES)
    if settings.split not in album.SPLITS:
        raise ValueError(unknown(settings.split, album.SPLITS, "split"))
    if "{concept}" not in settings.prompt:
        raise ValueError(f"--prompt {settings.prompt!r} does not say where the thing goes: write {{concept}} in it")
    asked = {name: _loaded(recipe, settings, "thing") for name, recipe in chosen.items()}
    learning = dump(load(settings.learn, settings.learn_overrides))
    for name, recipe in asked.items():
        _check(name, recipe)
    runner = Runner3D(load_backbone("toybox", device=pick_device(settings.device)))
    for name, recipe in asked.items():
        _check(name, recipe, runner)
    about = {"learn": learning, "checkpoint": runner.backbone.checkpoint, "evaluators": evaluators()}
    things = [h.name for h in held_out(settings.split)][: settings.subjects]
    contents = {name: dump(recipe) for name, recipe in asked.items()}
    experiment = Experiment(contents, things, settings.prompt, range(1), about)
    bench = _Bench(runner, Things(settings.out, settings.learn, settings.learn_overrides), settings)

    def cell(recipe: str, thing: str, workdir: Path) -> AssetCell:
        return bench.cell(chosen[recipe], thing, workdir)

    return benchmark(cell, experiment, settings.out, assets(settings.out, GOAL), progress=say)


def _check(name: str, recipe: Recipe3D, runner: Runner3D | None = None) -> None:
    """ValueError, naming the recipe, where it needs more than a prompt, or leaves nothing to judge."""
    try:
        if runner is not None:
            runner.check(recipe, {})
        check_fields(recipe)
        if recipe.export is None:
            raise ValueError("export = null leaves no mesh to judge")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _loaded(recipe: str, settings: AssetBenchmarkSettings, thing: str, noun: str = "") -> Recipe3D:
    prompt = fill(settings.prompt, thing, noun or thing)
    return load(recipe, [*settings.overrides, f"prompt={prompt}"], "3d", Recipe3D)


@dataclass(frozen=True)
class _Bench:
    """Learns things, each once, makes assets of them and judges those."""

    runner: Runner3D
    things: Things
    settings: AssetBenchmarkSettings
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)

    def cell(self, recipe: str, thing: str, workdir: Path) -> AssetCell:
        """One cell: two assets and their reports."""
        noun = album.held_out(thing).thing.class_name
        name = self.things.learned(self.runner, thing)
        try:
            mine = _loaded(recipe, self.settings, f"<{name}>", noun)
            make_once(self.runner, mine, workdir / ASSET, read(self.things.concept(thing)).meta.files)
        finally:
            self.runner.unload(name)
        make_once(self.runner, _loaded(recipe, self.settings, noun), workdir / PLAIN, {})
        by = self._yardstick(thing, mine.prompt)
        made = _judged(workdir / ASSET, workdir / REPORT, by)
        base = _judged(workdir / PLAIN, workdir / PLAIN_REPORT, by)
        return AssetCell(thing=thing, made=made, base=base, generic=by.generic_scores)

    def _yardstick(self, thing: str, prompt: str) -> Yardstick:
        if thing not in self.yardsticks:
            self.yardsticks[thing] = Yardstick.of(Against(thing, self.things.references(thing)), prompt)
        return self.yardsticks[thing]


def make_once(runner: Runner3D, recipe: Recipe3D, out: Path, concept: Mapping[str, str]) -> None:
    """The asset in a folder: as an earlier call left it where that was made with all the same, resumed where that was
    interrupted. concept: its files and their hashes."""
    made_with = {"recipe": dump(recipe), "concept": dict(concept), "checkpoint": runner.backbone.checkpoint}
    mark = hashlib.sha256(json.dumps(made_with, sort_keys=True, default=str).encode()).hexdigest()
    marked = out.with_name(f"{out.name}.made-with")
    same = marked.is_file() and marked.read_text(encoding="utf-8") == mark
    if same and (out / ABOUT).is_file():
        return
    files = AssetFiles(out, overwrite=True)
    files = replace(files, resume=same and checkpoint.load(files.workdir) is not None)
    files.check()
    if out.exists():  # an asset of something else: where the new one fails, it must not pass for that
        shutil.rmtree(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(marked, mark)
    create(runner, recipe, files)


def _judged(asset: Path, report: Path, by: Yardstick) -> AssetReport:
    found = measure(read_judged(asset), by)
    save_asset_report(found, report, overwrite=True)
    return found
