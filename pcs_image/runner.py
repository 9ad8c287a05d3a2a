"""The public face of `pcs_image`: personalize, generate, evaluate. Command line, Python and web page are doors to this."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shared.backbones import Backbone
from shared.concept import Concept, attach, capture
from shared.prompts import check_named, expand, names_in, without
from shared.recipe import Recipe
from shared.recipes import expand_phases
from shared.sampling.changes import Change
from shared.sampling.sampler import SAMPLE_PIXELS, rows_at_once, sample
from shared.train.loop import Record
from shared.train.session import Session
from shared.types import Subject

if TYPE_CHECKING:
    from shared.metrics.report import Report


def cache_folder() -> Path:
    """Where class pictures are kept between runs: $PCS_CACHE, else the user's cache folder."""
    root = os.environ.get("PCS_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "pcs")
    return Path(root).expanduser()


@dataclass(frozen=True)
class Loaded:
    """A concept that is attached to a backbone, with the strength it is used at."""

    concept: Concept
    strength: float = 1.0
    subject: Subject | None = None  # its pictures, where it was learned here


@dataclass
class Runner:
    """One backbone and the concepts attached to it."""

    backbone: Backbone
    loaded: dict[str, Loaded] = field(default_factory=dict)

    def load(self, concept: Concept, strength: float = 1.0) -> None:
        """Attach a concept. ValueError when it does not fit, or another of its name is loaded."""
        attach(concept, self.backbone, strength)
        self.loaded[concept.meta.name] = Loaded(concept, strength)

    def unload(self, name: str) -> None:
        """Take a concept off; the backbone is what it was before."""
        self.backbone.remove(name)
        del self.loaded[name]

    @property
    def strengths(self) -> dict[str, float]:
        return {name: loaded.strength for name, loaded in self.loaded.items() if name in self.backbone.adapters}

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
        on_step: Callable[[str, Record, int], None] | None = None,
        on_pictures: Callable[[str, int, int], None] | None = None,
        tensorboard: bool = True,
    ) -> dict[str, Concept]:
        """Learn every subject in one run; the concepts by name, also left attached.

        Args:
            subjects: name -> pictures
            workdir: training state, logs and sample pictures
            resume: go on from the newest checkpoint in `workdir`
            scorers: by subject, (pixels [N, 3, H, W] in [-1, 1], expanded prompts) -> scores with the key "score"
            on_step: called with (phase, record, total steps) after each step
            on_pictures: called with (what, done, of) while class pictures are made

        Raises:
            ValueError: names, pictures or recipe do not fit
            NotFinite, Interrupted: after the last good state was saved
        """
        for name in subjects:
            if name in self.loaded:
                raise ValueError(f"a concept named {name!r} is loaded already: choose another name")
        session = Session(
            self.backbone,
            recipe,
            subjects,
            workdir,
            cache_folder(),
            generate=self._class_pictures,
            preview=self._preview(subjects, recipe, scorers or {}),
            others=self.strengths,
            tensorboard=tensorboard,
            on_pictures=on_pictures,
        )
        try:
            with _own_randomness():
                for phase, record in session.steps(resume):
                    if on_step:
                        on_step(phase, record, session.total_steps)
            metrics = {**session.costs, **session.final_scores}
            concepts = {n: self._captured(n, subjects[n], recipe, session, metrics) for n in subjects}
        finally:
            self._forget(session)
        for name, concept in concepts.items():
            self.load(concept)
            self.loaded[name] = Loaded(concept, subject=subjects[name])
        return concepts

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        negative: str = "",
        guidance: float | None = None,
        steps: int | None = None,
        scheduler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        base: bool = False,
        must_name: bool = True,
        changes: Sequence[Change] = (),
    ) -> Tensor:
        """[N, 3, H, W] in [-1, 1] on the CPU, one picture per (prompt, seed) pair.

        `<name>` in a prompt is a loaded concept. With `base`, concepts are off and names are said as class nouns.
        Raises ValueError for a name that is not loaded, and, unless `must_name` is off, for a loaded subject that a
        prompt does not name.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts for {len(seeds)} seeds: one of each per picture")
        avoided = without(negative, self.class_nouns) if base else expand(negative, self.backbone.namings)
        if base:
            said = [without(p, self.class_nouns) for p in prompts]
        else:
            kinds = {name: loaded.concept.meta.kind for name, loaded in self.loaded.items()}
            for prompt in prompts if must_name else ():
                check_named(prompt, kinds)
            said = [expand(p, self.backbone.namings) for p in prompts]
        with self.backbone.active({} if base else self.strengths):
            return self._sampled(
                said,
                seeds,
                negative=avoided,
                guidance=guidance,
                steps=steps,
                scheduler=scheduler,
                height=height,
                width=width,
                changes=changes,
            )

    def evaluate(
        self,
        name: str,
        prompts: str = "",
        *,
        out: Path | None = None,
        references: Path | None = None,
        **settings: Any,
    ) -> Report:
        """Measure a loaded concept: what `pcs image evaluate` does.

        Args:
            name: of a concept that is loaded
            prompts: a prompt set ("toybox", "dreambench") or a file; default the backbone's own
            out: a folder for the report; default none is written
            references: the subject's pictures; default those that it was learned from here, or those beside its folder
            settings: of `pcs_image.scoring.evaluate_loaded`: gallery, seeds, limit, clip, dino, steps, guidance,
                scheduler, overwrite, progress

        Raises:
            ValueError: the concept is not loaded, its pictures are not to be found, there is nothing to measure with
        """
        from pcs_image.scoring import evaluate_loaded

        return evaluate_loaded(self, name, prompts, out=out, references=references, **settings)

    def _sampled(self, said: Sequence[str], seeds: Sequence[int], **settings: Any) -> Tensor:
        """Pictures on the CPU of expanded prompts, as many at once as memory surely holds."""
        side = self.backbone.resolution
        at_once = rows_at_once((settings.get("height") or side) * (settings.get("width") or side), SAMPLE_PIXELS)
        parts = [slice(i, i + at_once) for i in range(0, max(1, len(said)), at_once)]
        return torch.cat([sample(self.backbone, said[p], seeds=seeds[p], **settings).cpu() for p in parts])

    def _class_pictures(
        self, prompts: Sequence[str], seeds: Sequence[int], *, guidance: float, steps: int, resolution: int
    ) -> Tensor:
        return self._sampled(prompts, seeds, guidance=guidance, steps=steps, height=resolution, width=resolution)

    def _preview(self, subjects: Mapping[str, Subject], recipe: Recipe, scorers: Mapping[str, Any]) -> Any:
        phases = dict(expand_phases(recipe))

        def preview(phase: str, step: int) -> tuple[Tensor, Mapping[str, float]]:
            check, sampling = phases[phase].train.validation, phases[phase].sampling
            side = phases[phase].train.resolution or self.backbone.resolution
            pictures, scores = [], {}
            for name in subjects:
                prompts = [p.replace("{concept}", f"<{name}>") for p in check.prompts for _ in range(check.num)]
                seeds = [10_000 + i for i in range(len(prompts))]
                said = [expand(p, self.backbone.namings) for p in prompts]
                pixels = self._sampled(
                    said,
                    seeds,
                    height=side,
                    width=side,
                    guidance=sampling.guidance,
                    steps=sampling.steps,
                    scheduler=sampling.scheduler,
                )
                pictures.append(pixels)
                if name in scorers:
                    plain = [without(p, {name: subjects[name].class_noun}) for p in prompts]
                    for key, value in scorers[name](pixels, plain).items():
                        scores[key] = scores.get(key, 0.0) + value / len(subjects)
            return torch.cat(pictures), scores

        return preview

    def _captured(
        self, name: str, subject: Subject, recipe: Recipe, session: Session, metrics: Mapping[str, float]
    ) -> Concept:
        return capture(
            self.backbone,
            name,
            adapters_of=session.run_name,
            class_noun=subject.class_noun,
            kind=recipe.kind,
            recipe=recipe,
            metrics=metrics,
            references=subject.images,
            ports=sorted(session.ports),
        )

    def _forget(self, session: Session) -> None:
        for name in {*session.names, session.run_name}:
            if name in self.backbone.namings or name in self.backbone.adapters:
                self.backbone.remove(name)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The caller's global random state, of the CPU and of every GPU in use, is what it was afterwards."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=gpus):
        yield


@contextmanager
def attached(runner: Runner, concepts: Sequence[tuple[Concept, float]]) -> Iterator[Runner]:
    """The runner with these concepts loaded, and without them afterwards."""
    names = []
    try:
        for concept, strength in concepts:
            runner.load(concept, strength)
            names.append(concept.meta.name)
        yield runner
    finally:
        for name in names:
            runner.unload(name)


def metadata(prompt: str, seed: int, runner: Runner, **settings: Any) -> dict[str, str]:
    """What a picture's PNG says about how it was made: everything that is needed to make it again."""
    used = {n: runner.loaded[n].strength for n in runner.loaded}
    backbone = runner.backbone
    made = {
        "steps": backbone.default_steps,
        "guidance": backbone.default_guidance,
        "height": backbone.resolution,
        "width": backbone.resolution,
        **{k: v for k, v in settings.items() if v is not None and k != "changes"},
        "changes": [change.model_dump(mode="json") for change in settings.get("changes", ())],
    }
    about = {
        "prompt": prompt,
        "expanded": expand(prompt, backbone.namings),
        "seed": seed,
        "concepts": used,
        "named": list(names_in(prompt)),
        "backbone": backbone.name,
        "checkpoint": backbone.checkpoint,
        **made,
    }
    return {"pcs": json.dumps(about), "Software": "pcs", "Description": prompt}
