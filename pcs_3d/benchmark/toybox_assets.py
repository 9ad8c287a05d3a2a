"""Compares asset recipes on the toybox's held-out subjects. Each subject is learned from its pictures only once,
and its concept is shared by all recipes that do not learn the subject themselves."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from pcs_3d.assets import ABOUT, AssetFiles, create
from pcs_3d.benchmark.asset_cell import AssetCell
from pcs_3d.benchmark.asset_rows import AssetGoal
from pcs_3d.benchmark.asset_table import ASSET, PLAIN, PLAIN_REPORT, REPORT, AssetComparison, assets
from pcs_3d.distill.hand_over import check_fields
from pcs_3d.distill.reference_cameras import compares_with_subject
from pcs_3d.evaluation.asset_files import read_judged
from pcs_3d.evaluation.asset_report import AssetReport
from pcs_3d.evaluation.carving import write_class_mesh
from pcs_3d.evaluation.evaluate import measure
from pcs_3d.evaluation.save_asset_report import save_asset_report
from pcs_3d.evaluation.yardstick import Against, Yardstick
from pcs_3d.export.write import write_ply
from pcs_3d.fields.starts import MeshFile
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.backbones import load_backbone
from shared.benchmark.experiment import Experiment, benchmark
from shared.benchmark.toybox import Things, check_place, chosen_things, evaluators, named, say
from shared.concept import read
from shared.io.checksums import sha256
from shared.io.outputs import write_text
from shared.io.read_subject import read_subject
from shared.metrics.scorer import fill
from shared.recipe.phases import expand_phases, learns_subjects
from shared.recipe.reads import files_read
from shared.recipe.resolve import load
from shared.recipe.schema import dump
from shared.toybox import reference_sets as album
from shared.train import checkpoint
from shared.train.device import pick_device
from shared.types import Subject

RECIPES = (
    *("reference_reconstruction", "texture_from_views", "texture_refinement", "hifa", "dreamfusion", "prolificdreamer"),
    "lucid_dreamer",
)
#: The project's own targets.
GOAL = AssetGoal(identity=0.50, view=0.65, iou=0.55)


@dataclass(frozen=True)
class AssetBenchmarkSettings:
    """Settings of a comparison: the subjects, the recipe that learns them, and the output folder."""

    split: str = "development"  # which held-out subjects to use; use "reporting" only once, at the end
    subjects: int | tuple[str, ...] = 4  # how many (the first N of the split), or their names
    learn: str = "t_lora"  # recipe that learns subjects from pictures
    prompt: str = "a photo of a {concept}"
    out: Path = Path("benchmark")
    device: str | None = None  # None uses the GPU if there is one
    overrides: tuple[str, ...] = ()  # key=value settings for every asset recipe
    learn_overrides: tuple[str, ...] = ()  # key=value settings for the recipe that learns subjects


def run(recipes: Sequence[str], settings: AssetBenchmarkSettings) -> AssetComparison:
    """Learns the split's subjects, then makes and scores an asset of each subject with every recipe. Recipes are given
    by name or as YAML files. If `recipes` is empty, those in `RECIPES` are used.

    Each recipe makes one asset with the concept and one with only the class in the prompt. A recipe that learns the
    subject itself gets the subject's pictures instead of the concept and makes only the first asset. A recipe that
    needs a mesh (`field.start.kind=file` without a path) gets a grey one with the usual shape of the subject's class.
    An interrupted call is resumed if the arguments are the same.

    Raises ValueError for an unknown recipe or split, and for recipes that need more than a prompt, pictures, a mesh and
    a concept.
    """
    chosen = named(recipes or RECIPES)
    things = chosen_things(settings.split, settings.subjects)
    if "{concept}" not in settings.prompt:
        raise ValueError(f"--prompt {settings.prompt!r} does not say where the subject goes: put {{concept}} in it")
    asked = {name: _example(recipe, settings) for name, recipe in chosen.items()}
    learning = dump(load(settings.learn, settings.learn_overrides))
    with TemporaryDirectory() as folder:
        mesh = _stand_in(Path(folder))
        tried = {name: _example(recipe, settings, mesh) for name, recipe in chosen.items()}
        for name, recipe in tried.items():
            _check(name, recipe)
        check_place(settings.out, [*chosen.values(), settings.learn], asked.values())
        runner = Runner3D(load_backbone("toybox", device=pick_device(settings.device)))
        example = read_subject(album.write_album(things[0], Path(folder) / "pictures")[0].parent, class_noun="thing")
        for name, recipe in tried.items():
            _check(name, recipe, runner, {"thing": example} if _needs_pictures(recipe) else {})
    about = {"learn": learning, "checkpoint": runner.backbone.checkpoint, "evaluators": evaluators()}
    contents = {name: dump(recipe) for name, recipe in asked.items()}
    experiment = Experiment(contents, things, settings.prompt, range(1), about)
    bench = _Bench(runner, Things(settings.out, settings.learn, settings.learn_overrides), settings)

    def cell(recipe: str, thing: str, workdir: Path) -> AssetCell:
        return bench.cell(chosen[recipe], thing, workdir)

    return benchmark(cell, experiment, settings.out, assets(settings.out, GOAL), progress=say)


def _check(
    name: str, recipe: Recipe3D, runner: Runner3D | None = None, subjects: Mapping[str, Subject] | None = None
) -> None:
    """Raises ValueError, naming the recipe, if it needs more than a prompt, pictures and a mesh, or makes no mesh to
    evaluate."""
    try:
        if runner is not None:
            runner.check(recipe, subjects or {})
        check_fields(recipe)
        if recipe.export is None:
            raise ValueError("export = null leaves no mesh to evaluate: choose a recipe that exports one")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _loaded(
    recipe: str, settings: AssetBenchmarkSettings, thing: str, noun: str = "", mesh: Path | None = None
) -> Recipe3D:
    """Loads a recipe for a thing. If `mesh` is given, the phases that need a mesh start from it."""
    prompt = f"prompt={fill(settings.prompt, thing, noun or thing)}"
    found = load(recipe, [*settings.overrides, prompt], "3d", Recipe3D)
    starts = _starts(found)
    if mesh is None or not starts:
        return found
    return load(recipe, [*settings.overrides, prompt, *(f"{key}={mesh}" for key in starts)], "3d", Recipe3D)


def _example(recipe: str, settings: AssetBenchmarkSettings, mesh: Path | None = None) -> Recipe3D:
    """Returns the recipe with a placeholder for the subject in its prompt. If the recipe learns the subject, the
    placeholder is `<thing>`; otherwise it is a plain word, because no concept is loaded yet."""
    loaded = _loaded(recipe, settings, "thing", mesh=mesh)
    return _loaded(recipe, settings, "<thing>", "thing", mesh) if learns_subjects(loaded) else loaded


def _starts(recipe: Recipe3D) -> list[str]:
    """Returns the keys of the mesh files that the recipe needs but does not name."""
    return [
        f"phases.{name}.field.start.path" if recipe.phases else "field.start.path"
        for name, phase in expand_phases(recipe)
        if isinstance(phase.field.start, MeshFile) and phase.field.start.path is None
    ]


def _stand_in(folder: Path) -> Path:
    """Writes a tetrahedron for checking recipes that need a mesh. Returns the file's path."""
    corners = np.array([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) / 3**0.5
    return write_ply(folder / "thing.ply", corners, np.array([[0, 1, 2], [0, 3, 1], [0, 2, 3], [1, 3, 2]]), corners * 0)


def _needs_pictures(recipe: Recipe3D) -> bool:
    return learns_subjects(recipe) or compares_with_subject(recipe)


@dataclass(frozen=True)
class _Bench:
    """Learns each subject once, makes assets from it and evaluates them."""

    runner: Runner3D
    things: Things
    settings: AssetBenchmarkSettings
    yardsticks: dict[str, Yardstick] = field(default_factory=dict)

    def cell(self, recipe: str, thing: str, workdir: Path) -> AssetCell:
        """Makes one cell. It contains the report on an asset with the concept and, unless the recipe learns the subject
        itself, the report on an asset without the concept."""
        noun = album.held_out(thing).thing.class_name
        plain = _loaded(recipe, self.settings, noun)
        mesh = self._mesh(noun) if _starts(plain) else None
        alone = learns_subjects(plain)
        make = self._alone if alone else self._pair
        prompt = make(recipe, thing, noun, workdir, mesh)
        by = self._yardstick(thing, prompt)
        made = _judged(workdir / ASSET, workdir / REPORT, by)
        base = None if alone else _judged(workdir / PLAIN, workdir / PLAIN_REPORT, by)
        given = mesh is not None
        return AssetCell(thing=thing, made=made, base=base, generic=by.generic_scores, shape_given=given)

    def _mesh(self, noun: str) -> Path:
        """Returns the path of the class's mesh file, which is written on first use."""
        path = self.settings.out / "meshes" / f"{noun}.ply"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_class_mesh(noun, path)
        return path.absolute()

    def _alone(self, recipe: str, thing: str, noun: str, workdir: Path, mesh: Path | None) -> str:
        """Makes an asset with a recipe that learns the subject. Returns the prompt."""
        album.write_album(thing, self.things.references(thing), overwrite=True)
        mine = _loaded(recipe, self.settings, f"<{thing}>", noun, mesh)
        make_once(self.runner, mine, workdir / ASSET, {}, self._pictures(thing, noun))
        return mine.prompt

    def _pair(self, recipe: str, thing: str, noun: str, workdir: Path, mesh: Path | None) -> str:
        """Makes one asset with the concept and one without it. Returns the prompt of the first."""
        name = self.things.learned(self.runner, thing)
        try:
            mine = _loaded(recipe, self.settings, f"<{name}>", noun, mesh)
            subjects = self._pictures(thing, noun) if _needs_pictures(mine) else {}
            make_once(self.runner, mine, workdir / ASSET, read(self.things.concept(thing)).meta.files, subjects)
        finally:
            self.runner.unload(name)
        make_once(self.runner, _loaded(recipe, self.settings, noun, mesh=mesh), workdir / PLAIN, {}, subjects)
        return mine.prompt

    def _pictures(self, thing: str, noun: str) -> dict[str, Subject]:
        return {thing: read_subject(self.things.references(thing), class_noun=noun)}

    def _yardstick(self, thing: str, prompt: str) -> Yardstick:
        if thing not in self.yardsticks:
            self.yardsticks[thing] = Yardstick.of(Against(thing, self.things.references(thing)), prompt)
        return self.yardsticks[thing]


def make_once(
    runner: Runner3D,
    recipe: Recipe3D,
    out: Path,
    concept: Mapping[str, str],
    subjects: dict[str, Subject] | None = None,
) -> None:
    """Makes an asset in the folder `out`, unless an earlier call with identical inputs has already made it. Resumes an
    interrupted call.

    Args:
        concept: the concept's files and their hashes
        subjects: pictures for recipes that learn from them or compare views with them
    """
    pictures = {f.name: sha256(f) for subject in (subjects or {}).values() for f in subject.files}
    inputs = {"concept": dict(concept), **({"pictures": pictures} if pictures else {})}
    made_with = {"recipe": dump(recipe), "checkpoint": runner.backbone.checkpoint, **inputs}
    text = json.dumps(made_with, sort_keys=True, default=str)
    for file in files_read(recipe):  # only the file's contents count, not its location
        text = text.replace(json.dumps(str(file)), json.dumps(sha256(file)))
    mark = hashlib.sha256(text.encode()).hexdigest()
    done, begun = (out.with_name(f"{out.name}.{step}-with") for step in ("made", "begun"))
    if _holds(done, mark) and (out / ABOUT).is_file():
        return
    files = AssetFiles(out, overwrite=True)
    files = replace(files, resume=_holds(begun, mark) and checkpoint.load(files.workdir) is not None)
    files.check()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(begun, mark)
    create(runner, recipe, files, subjects)  # an earlier asset is replaced only once this one is complete
    write_text(done, mark)
    begun.unlink()


def _holds(file: Path, mark: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == mark


def _judged(asset: Path, report: Path, by: Yardstick) -> AssetReport:
    found = measure(read_judged(asset), by)
    save_asset_report(found, report, overwrite=True)
    return found
