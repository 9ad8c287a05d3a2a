"""The base class of every package's runner. A runner loads concepts onto one backbone, learns new concepts, generates
pictures or clips, and evaluates concepts."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from shared.backbones import Backbone
from shared.concept import Concept, Provenance, attach, capture
from shared.config import NAME
from shared.io.cache import cache_folder
from shared.io.denoising_progress import Steps, named, part_of
from shared.metrics.report import Report
from shared.prompts import check_named, expand, without
from shared.recipe.phases import check_learns, expand_phases
from shared.recipe.schema import Recipe
from shared.runner.judging import FIRST_SEED, EvaluationSettings, evaluate_loaded, references, training_scorers
from shared.runner.loaded_concepts import Loaded
from shared.runner.plan import Plan
from shared.sampling.hooks import StrengthSchedule
from shared.sampling.sampler import sample_all, sample_each
from shared.sampling.settings import SamplingSettings, Start
from shared.train.loop import Record
from shared.train.phase_context import MakeNow, TaskTable
from shared.train.training_run import TASKS, TrainingRun
from shared.types import Subject


class Progress(Protocol):
    """Receives a run's progress."""

    def step(self, phase: str, record: Record, total: int) -> None:
        """Called after each step; `total` counts the steps of all phases."""
        ...

    def pictures(self, what: str, done: int, of: int) -> None:
        """Called after each denoising step while class pictures and previews are generated."""
        ...


@dataclass
class Runner:
    """One backbone and the concepts attached to it."""

    tasks: ClassVar[TaskTable] = TASKS  # task part -> the function that builds its task
    scorers: ClassVar[Callable[..., Any]] = staticmethod(training_scorers)  # returns scorers for training
    makes: ClassVar[str] = "pictures"
    uses_motions: ClassVar[bool] = False  # whether a motion can change what is generated
    #: For each kind of model that this runner opens, the families whose concepts can be loaded onto such a model.
    families: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"stable_diffusion"}), frozenset({"flux"}))
    backbone: Backbone
    loaded: dict[str, Loaded] = field(default_factory=dict)

    @classmethod
    def prepared(cls, backbone: Backbone) -> Backbone:
        """Prepares a loaded backbone for this runner. Raises ValueError if that is impossible."""
        return backbone

    @classmethod
    def check_plan(cls, planned: Plan, backbone: str | Path | None) -> None:
        """Raises ValueError, before the model is loaded, if the model's files show that it cannot do what the plan needs."""

    def make(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingSettings, progress: Steps | None = None
    ) -> Tensor:
        """Generates one picture or clip per (prompt, seed) pair, with the concepts as they are. Returns pictures
        [N, 3, H, W] or clips [N, 3, F, H, W] in [-1, 1], on the CPU.

        Args:
            prompts: expanded prompts
            progress: called with (done, total) after each denoising step, counting the steps of every item
        """
        return sample_all(self.backbone, prompts, seeds=seeds, settings=settings, progress=progress)

    def load(self, concept: Concept, strength: float = 1.0) -> None:
        """Attaches a concept. Raises ValueError if it is incompatible with the backbone, if it is a motion and this runner
        uses none, or if its name is taken."""
        self.check_kind(concept)
        attach(concept, self.backbone, strength)
        self.loaded[concept.meta.name] = Loaded(concept)

    @classmethod
    def check_kind(cls, concept: Concept) -> None:
        """Raises ValueError if the concept is a motion and this runner uses none."""
        if concept.meta.kind == "motion" and not cls.uses_motions:
            raise ValueError(
                f"{concept.meta.name!r} is a motion, and {cls.makes} cannot show one: leave it out, or use pcs video"
            )

    def unload(self, name: str) -> None:
        """Removes a concept and restores the backbone."""
        self.backbone.remove(name)
        del self.loaded[name]

    @property
    def strengths(self) -> dict[str, float]:
        """The backbone's strengths for loaded concepts that have adapters."""
        return {name: s for name, s in self.backbone.strengths.items() if name in self.backbone.adapters}

    @property
    def class_nouns(self) -> dict[str, str]:
        return {name: loaded.concept.meta.class_noun for name, loaded in self.loaded.items()}

    def personalize(
        self,
        subjects: Mapping[str, Subject],
        recipe: Recipe,
        workdir: Path,
        *,
        resume: bool = False,
        scorers: Mapping[str, Callable[[Tensor, Sequence[str]], Mapping[str, float]]] | None = None,
        progress: Progress | None = None,
        tensorboard: bool = True,
    ) -> dict[str, Concept]:
        """Learns every subject in one run. Returns the concepts by name, and leaves them attached.

        Args:
            subjects: the pictures of each subject, by name
            workdir: the folder for training state, logs and sample pictures
            resume: whether to resume from the newest checkpoint in `workdir`
            scorers: for each subject, a function that takes pixels [N, 3, H, W] in [-1, 1] and plain prompts, and
                returns scores, one of which has the key "score"
            progress: notified after every training step, and after every denoising step of class pictures and previews
            tensorboard: whether to also write the log as TensorBoard events

        Raises:
            ValueError: if the names, pictures or recipe are unsuitable
            NotFinite, Interrupted: after the last good state has been saved
        """
        check_learns(recipe)
        for name in subjects:
            if not re.match(NAME, name):
                raise ValueError(f"a concept cannot be called {name!r}: use only letters, digits, - and _")
            if name in self.loaded:
                raise ValueError(f"a concept named {name!r} is already loaded: choose another name")
        run = self._training(
            recipe,
            subjects,
            workdir,
            progress,
            preview=self._preview(subjects, recipe, scorers or {}, progress),
            scorers=scorers or {},
            tensorboard=tensorboard,
        )
        try:
            with own_randomness():
                for phase, record in run.steps(resume):
                    if progress:
                        progress.step(phase, record, run.total_steps)
            metrics = {**run.costs, **run.final_scores}
            concepts = {n: self._captured(n, subjects[n], recipe, run, metrics) for n in subjects}
        finally:
            self._forget(run)
        for name, concept in concepts.items():
            self.load(concept)
            self.loaded[name] = Loaded(concept, subject=subjects[name])
        return concepts

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings = SamplingSettings(),
        *,
        base: bool = False,
        must_name: bool = True,
        progress: Steps | None = None,
    ) -> Tensor:
        """Generates one item per (prompt, seed) pair with the loaded concepts. Returns pictures [N, 3, H, W] or clips
        [N, 3, F, H, W] in [-1, 1], on the CPU.

        `<name>` in a prompt refers to a loaded concept. If `base` is set, the concepts are switched off and their names
        are replaced with their class nouns. Otherwise, raises ValueError if a prompt contains a name that is not loaded
        or, with `must_name` set, does not name every loaded subject.
        """
        how: dict[str, Any] = {"base": base, "must_name": must_name, "progress": progress}
        made = list(self.generate_each(prompts, seeds, settings, **how))
        order, pixels = [row for rows, _ in made for row in rows], torch.cat([part for _, part in made])
        return pixels if order == sorted(order) else pixels[torch.tensor(order).argsort()]

    def generate_each(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings = SamplingSettings(),
        *,
        base: bool = False,
        must_name: bool = True,
        progress: Steps | None = None,
    ) -> Generator[tuple[Sequence[int], Tensor], None, None]:
        """Generates as `generate` does, but yields each batch once it is done, as the positions of its items and their
        pixels, so that memory use does not grow with the number of items. Concepts are switched on until the generator is
        exhausted or closed."""
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds: give one seed per prompt")
        placeholders = self.backbone.placeholders
        if base:
            texts = [without(p, self.class_nouns) for p in prompts]
        else:
            kinds = {name: loaded.concept.meta.kind for name, loaded in self.loaded.items()}
            for prompt in prompts if must_name else ():
                check_named(prompt, kinds)
            texts = [expand(p, placeholders) for p in prompts]
        negatives = (settings.negative,) if isinstance(settings.negative, str) else settings.negative
        avoided = tuple(without(n, self.class_nouns) if base else expand(n, placeholders) for n in negatives)
        settings = replace(settings, negative=avoided[0] if len(avoided) == 1 else avoided)
        settings = settings if base else self.with_own_sampling(settings)
        with self.backbone.active({} if base else self.strengths):
            first = 0
            for pixels in sample_each(self.backbone, texts, seeds=seeds, settings=settings, progress=progress):
                yield range(first, first + len(pixels)), pixels
                first += len(pixels)

    def with_own_sampling(self, settings: SamplingSettings) -> SamplingSettings:
        """Completes the settings with those in the loaded concepts' recipes. Values that are already set are kept.

        Guidance, steps and scheduler all come from the motion's recipe if a motion is loaded, and from the first
        concept's recipe otherwise. Each concept's strength by step comes from its own recipe (`sampling.strength`) and
        is multiplied by the strength with which the concept was loaded.
        """
        said = {name for hook in settings.hooks if isinstance(hook, StrengthSchedule) for name in hook.strengths}
        own = []
        for name, loaded in self.loaded.items():
            points = loaded.concept.meta.learned_with.sampling.strength
            if points and name not in said and name in self.backbone.strengths:
                own.append(StrengthSchedule.parse(f"{name}={points}").times(self.backbone.strengths[name]))
        recipes = [loaded.concept.meta for loaded in self.loaded.values()]
        leading = next((meta for meta in recipes if meta.kind == "motion"), recipes[0] if recipes else None)
        if leading is not None:
            settings = settings.completed(leading.learned_with.sampling)
        return replace(settings, hooks=(*settings.hooks, *own))

    def evaluate(self, name: str, settings: EvaluationSettings = EvaluationSettings()) -> Report:
        """Scores a loaded concept, as `pcs image evaluate` does.

        Raises:
            ValueError: if the concept is not loaded, its pictures cannot be found, or no instrument is available
        """
        return evaluate_loaded(self, name, settings)

    def shown(self, subject: Subject, side: int) -> Tensor:
        """Returns the pictures [N, 3, side, W] that represent the subject on a contact sheet."""
        return references(subject, side)

    def _class_pictures(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        guidance: float,
        steps: int,
        resolution: int,
        frames: int = 0,
        progress: Steps | None = None,
    ) -> Tensor:
        settings = SamplingSettings("", guidance, steps, height=resolution, width=resolution, frames=frames)
        return self.make(prompts, seeds, settings, progress)

    def _training(
        self, recipe: Recipe, subjects: Mapping[str, Subject], workdir: Path, progress: Progress | None, **more: Any
    ) -> TrainingRun:
        """Returns a training run of the recipe on top of the loaded concepts, without starting it."""
        known: dict[str, Any] = {
            "class_pictures": self._class_pictures,
            "make": self._made_now(progress),
            "loaded_strengths": self.strengths,
            "loaded_nouns": self.class_nouns,
            "on_pictures": progress.pictures if progress else None,
            "tasks": self.tasks,
        }
        return TrainingRun(self.backbone, recipe, subjects, workdir, cache_folder(), **{**known, **more})

    def _made_now(self, progress: Progress | None) -> MakeNow:
        on_progress = named(progress.pictures if progress else None, "a batch of pictures")

        def made(prompts: Sequence[str], seeds: Sequence[int], recipe: Recipe, start: Start | None = None) -> Tensor:
            return self.make(prompts, seeds, replace(self._as_trained(recipe), start=start), on_progress)

        return made

    def _as_trained(self, recipe: Recipe) -> SamplingSettings:
        """Returns a recipe's sampling settings for pictures generated during training, at the training resolution."""
        how, side = recipe.sampling, recipe.train.resolution or self.backbone.resolution
        in_training = [n for n in self.backbone.adapters if n not in self.loaded] if how.strength else []
        hooks = tuple(StrengthSchedule.parse(f"{n}={how.strength}") for n in in_training)
        return replace(how.settings(), height=side, width=side, hooks=hooks)

    def _preview(
        self,
        subjects: Mapping[str, Subject],
        recipe: Recipe,
        scorers: Mapping[str, Any],
        progress: Progress | None = None,
    ) -> Any:
        phases = dict(expand_phases(recipe))

        def preview(phase: str, step: int) -> tuple[Tensor, Mapping[str, float]]:
            check, settings = phases[phase].train.validation, self._as_trained(phases[phase])
            pictures, scores = [], {}
            on_progress = named(progress.pictures if progress else None, f"pictures at step {step}")
            for number, name in enumerate(subjects):
                prompts = [p.replace("{concept}", f"<{name}>") for p in check.prompts for _ in range(check.num)]
                seeds = [FIRST_SEED + i for i in range(len(prompts))]
                texts = [expand(p, self.backbone.placeholders) for p in prompts]
                count = len(prompts)
                on_part = part_of(on_progress, number * count, count, len(subjects) * count)
                pixels = self.make(texts, seeds, settings, on_part)
                pictures.append(pixels)
                if name in scorers:
                    plain = [without(p, {name: subjects[name].class_noun}) for p in prompts]
                    for key, value in scorers[name](pixels, plain).items():
                        scores[key] = scores.get(key, 0.0) + value / len(subjects)
            return torch.cat(pictures), scores

        return preview

    def _captured(
        self, name: str, subject: Subject, recipe: Recipe, run: TrainingRun, metrics: Mapping[str, float]
    ) -> Concept:
        provenance = Provenance(
            kind=recipe.kind,
            class_noun=subject.class_noun,
            recipe=recipe,
            metrics=metrics,
            references=subject.files,
            ports=sorted(run.ports),
        )
        return capture(self.backbone, name, provenance, adapter_sets=run.kept_sets)

    def _forget(self, run: TrainingRun) -> None:
        for name in {*run.names, *run.sets_of_the_run}:
            self.backbone.keep_attending(name)
            if name in self.backbone.placeholders or name in self.backbone.adapters:
                self.backbone.remove(name)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Restores the caller's global random state at the end of the context, on the CPU and on every GPU in use."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        yield


R = TypeVar("R", bound=Runner)


@contextmanager
def attached(runner: R, concepts: Sequence[tuple[Concept, float]]) -> Iterator[R]:
    """Loads these concepts into the runner for the duration of the context."""
    names = []
    try:
        for concept, strength in concepts:
            runner.load(concept, strength)
            names.append(concept.meta.name)
        yield runner
    finally:
        for name in names:
            runner.unload(name)
