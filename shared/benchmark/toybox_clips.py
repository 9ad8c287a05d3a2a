"""Compares motion recipes on the toybox's held-out motions, performed by held-out things that are learned from pictures.
A recipe that learns a thing together with its motion is given clips of the thing in motion instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from shared.backbones import load_backbone
from shared.benchmark.clip_table import ClipComparison, ClipGoal, clips
from shared.benchmark.experiment import Experiment, benchmark
from shared.benchmark.toybox import Things, check_place, chosen_of, chosen_things, evaluators, learned, named, say
from shared.concept import read
from shared.evaluation.clips.evaluate import KeptClips
from shared.metrics.clips.report import ClipReport
from shared.recipe.catalog import recipe_files
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load
from shared.recipe.schema import Recipe, dump
from shared.runner.base import Runner
from shared.runner.judging_clips import ClipEvaluationSettings, evaluate_clips_loaded
from shared.sampling.settings import SamplingSettings
from shared.toybox import reference_sets as album
from shared.toybox.motions.held_out import held_out_motions
from shared.toybox.motions.reference_clips import write_motion
from shared.train.device import pick_device

PROMPTS = "toybox_motion"
#: The project's own targets.
GOAL = ClipGoal(motion=0.60, identity=0.60, over_floor=0.30, both=0.45, leaks_less_than="animatediff_motion_lora")


@dataclass(frozen=True)
class ClipBenchmarkSettings:
    """The settings of a benchmark of motion recipes on the toybox."""

    split: str = "development"  # split of the held-out motions and things; use "reporting" only once, at the end
    motions: int | tuple[str, ...] = 6  # number of motions (the first N of the split), or their names
    subjects: int | tuple[str, ...] = 4  # number of things (the first N of the split), or their names; 0: only motions
    # the image or video recipe with which each thing is learned once, from pictures
    subject_recipe: str = "dreambooth_lora"
    limit: int = 1  # number of prompts
    num: int = 4  # clips per prompt
    out: Path = Path("benchmark")
    device: str | None = None  # None means the GPU if there is one
    overrides: tuple[str, ...] = ()  # key=value applied on top of every motion recipe
    subject_overrides: tuple[str, ...] = ()  # key=value applied on top of `subject_recipe`
    steps: int | None = None  # denoising steps; if None, as in the motion's recipe
    motion_adapter: Path | None = None  # a folder; if None, the toybox's own motion adapter


def run(
    kind: type[Runner], model: type[Recipe], recipes: Sequence[str], settings: ClipBenchmarkSettings
) -> ClipComparison:
    """Learns the split's motions with every motion recipe, then generates and scores clips. Each cell combines a
    motion with a thing.

    Raises ValueError for an unknown recipe or split. Resumes where an earlier call with the same arguments stopped.

    recipes: names of shipped recipes, or files; if empty, all shipped recipes that learn motions
    """
    chosen = named(recipes or _of_motions(model, together=bool(settings.subjects)))
    resolved = {name: _load(recipe, settings.overrides, model) for name, recipe in chosen.items()}
    together = frozenset(name for name, recipe in resolved.items() if _learns_both(recipe))
    for name, recipe in resolved.items():
        if recipe.kind != "motion" and name not in together:
            raise ValueError(f"{name} learns a subject from pictures, not a motion: give it as --subject-recipe {name}")
    if together and not settings.subjects:
        raise ValueError(f"--subjects 0: {', '.join(sorted(together))} learns a subject together with its motion")
    contents = {name: dump(recipe) for name, recipe in resolved.items()}
    things = _things(settings, model)
    subject = dump(load(things.recipe, things.overrides, things.modality, things.model)) if settings.subjects else None
    cells = cells_of(settings)
    adapters = [path for path in (settings.motion_adapter,) if path is not None and path.exists()]
    check_place(settings.out, [*chosen.values(), things.recipe], resolved.values(), adapters)
    device = pick_device(settings.device)
    how = {} if settings.motion_adapter is None else {"motion_adapter": settings.motion_adapter}
    runner = kind(kind.prepared(load_backbone("toybox", device=device), **how))
    painter = Runner(load_backbone("toybox", device=device)) if things.modality == "image" else runner
    about = {"limit": settings.limit, "steps": settings.steps, "subject": subject}
    about |= {"checkpoint": runner.backbone.checkpoint, "evaluators": evaluators()}
    experiment = Experiment(contents, list(cells), PROMPTS, range(settings.num), about)
    bench = _Bench(runner, painter, things, model, settings, together)

    def cell(recipe: str, name: str, workdir: Path) -> ClipReport:
        return bench.report(recipe, chosen[recipe], cells[name], workdir)

    return benchmark(cell, experiment, settings.out, clips(GOAL), progress=say)


def _things(settings: ClipBenchmarkSettings, model: type[Recipe]) -> Things:
    """Returns the things, which will be learned with `subject_recipe`. That recipe is looked up among the image recipes
    first, and then among the video recipes. Raises ValueError if it is neither, or if it learns a motion or from clips.
    """
    recipe, overrides = settings.subject_recipe, settings.subject_overrides
    things = Things(settings.out, recipe, overrides)
    if not settings.subjects:
        return things
    try:
        load(recipe, overrides)
    except ValueError as error:
        try:
            found = load(recipe, overrides, "video", model)
        except ValueError as other:
            raise (other if recipe in recipe_files("video") else error) from None
        if found.kind == "motion":
            raise ValueError(f"--subject-recipe {recipe} learns a motion, not a subject") from None
        if _learns_both(found):
            raise ValueError(
                f"--subject-recipe {recipe} learns a subject together with its motion, not from pictures: compare it "
                f"with the motion recipes (pcs video benchmark {recipe} …)"
            ) from None
        return replace(things, modality="video", model=model)
    return things


def _learns_both(recipe: Recipe) -> bool:
    """Whether a recipe learns a subject together with its motion, from clips that show both."""
    clips = any(source.kind == "clips" for _, phase in expand_phases(recipe) for source in phase.sources.values())
    return clips and recipe.kind != "motion"


def _of_motions(model: type[Recipe], together: bool) -> list[str]:
    """Lists the shipped recipes that learn motions.

    together: whether to include those that learn a subject together with its motion
    """
    found = {name: _load(name, (), model) for name in recipe_files("video")}
    return [name for name, recipe in found.items() if recipe.kind == "motion" or (together and _learns_both(recipe))]


def _load(recipe: str, overrides: Sequence[str], model: type[Recipe]) -> Recipe:
    return load(recipe, overrides, "video", model)


def cells_of(settings: ClipBenchmarkSettings) -> Mapping[str, tuple[str, str]]:
    """Maps each cell's name in the table to (held-out motion, held-out thing or "")."""
    split = settings.split
    motions = chosen_of(
        "motion", split, lambda: [f"{split}-{m.name}" for m in held_out_motions(split)], settings.motions
    )
    things = chosen_things(split, settings.subjects) or [""]
    short = len(settings.split) + 1
    return {
        f"{m[short:]} with {t[short:]}" if t else m[short:]: (m, t)
        for m in motions
        for t in things
    }  # fmt: skip


@dataclass(frozen=True)
class _Bench:
    """Learns each motion and each thing once, and evaluates them together. Recipes in `together` learn both at once."""

    runner: Runner
    painter: Runner  # learns things
    things: Things
    model: type[Recipe]
    settings: ClipBenchmarkSettings
    together: frozenset[str] = frozenset()
    kept: KeptClips = field(default_factory=dict)  # clips without the motion

    def report(self, name: str, recipe: str, cell: tuple[str, str], workdir: Path) -> ClipReport:
        """Returns one cell's report."""
        motion, thing = cell
        both = name in self.together
        references = self.settings.out / "references" / (f"{motion} with {thing}" if both else motion)
        write_motion(motion, references, overwrite=True, thing=thing if both else "")
        if both:
            album.write_album(thing, self.things.references(thing), overwrite=True)
        elif thing:  # learn the thing before the motion is loaded
            self.painter.unload(self.things.learned(self.painter, thing))
        loaded = [self._motion(name, recipe, cell, references)]
        try:
            if thing and not both:
                loaded.append(self._thing(thing))
            judged = ClipEvaluationSettings(
                PROMPTS, tuple(range(self.settings.num)), self.settings.limit,
                SamplingSettings(steps=self.settings.steps),
                references=references, pictures=self.things.references(thing) if thing else None,
                out=workdir / "report", overwrite=True,
            )  # fmt: skip
            return evaluate_clips_loaded(self.runner, judged, kept=self.kept)
        finally:
            for concept in loaded:
                self.runner.unload(concept)

    def _motion(self, name: str, recipe: str, cell: tuple[str, str], references: Path) -> str:
        """Learns a motion, or a thing together with its motion, if needed and loads it. Returns the concept's name."""
        (motion, thing), folder = cell, self.settings.out / "motions" / name
        concept = (folder / thing if name in self.together else folder) / f"{motion}.concept"
        places = [f"subject.clips={references}", f"output={concept}"]
        if name in self.together:
            places.append(f"subject.class_noun={album.held_out(thing).thing.class_name}")
        return learned(self.runner, _load(recipe, [*self.settings.overrides, *places], self.model), concept)

    def _thing(self, thing: str) -> str:
        """Loads a learned thing. Returns its name."""
        kept = read(self.things.concept(thing))
        self.runner.load(kept)
        return kept.meta.name
