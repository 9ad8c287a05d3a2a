"""Judges a motion, a subject or both in clips. Chooses the clips and pictures for comparison, and writes the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from shared.backbones import Backbone
from shared.concept.provenance import public_name
from shared.config import unknown
from shared.evaluation.clips.case_facts import ClipCase
from shared.evaluation.clips.evaluate import ClipShots, KeptClips, Makers, evaluate_clips
from shared.evaluation.clips.prompt_sets import DEFAULT, ClipTexts, load_clip_prompts
from shared.evaluation.evaluate import Generate
from shared.evaluation.report_facts import Case
from shared.evaluation.true_figures import true_figures
from shared.io.denoising_progress import Steps
from shared.metrics.clips.paths import KnownMotion, PathReader, known_motion, recognition_ceiling
from shared.metrics.clips.readers import load_path_reader
from shared.metrics.clips.report import ClipReport, Kind
from shared.metrics.clips.scorer import ClipScorer
from shared.metrics.encoders import Instruments
from shared.metrics.instruments import load_instruments
from shared.metrics.report import Score
from shared.metrics.scorer import Scorer
from shared.recipe.reads import sources_of
from shared.runner.judging import EvaluationSettings, check_folders, picture_case, round_trip, score_line
from shared.runner.loaded_concepts import Loaded, Painter
from shared.runner.training_clips import motion_clips, read_motion
from shared.sampling.settings import SamplingSettings
from shared.types import Subject

FalseMotion = Literal["unnamed", "off", "none"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ClipEvaluationSettings:
    """The settings for judging concepts in clips."""

    prompts: str = DEFAULT  # a prompt set for clips, or a file
    seeds: tuple[int, ...] = (0, 1)
    limit: int | None = None  # the number of prompts to use, from the start of the set; None: all
    # fields that are None come from the concept's recipe
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    references: Path | None = None  # the motion's clips; default: its training clips, found next to its folder
    pictures: Path | None = None  # the subject's pictures; default: its training pictures
    gallery: Path | None = None  # a folder with one folder of pictures per look-alike of the same class
    clip: Path | None = None  # the folder of a CLIP model to measure with
    dino: Path | None = None  # the folder of a DINO model to measure with
    # reads the paths of subjects in clips; None: the reader of the model's world, if there is one
    reader: PathReader | None = None
    # how to generate clips without the motion while it is loaded: "unnamed" leaves its name out of the prompts, "off"
    # names it at strength 0, and "none" generates no such clips
    false_motion: FalseMotion = "unnamed"
    compensate_camera: bool = False  # subtract the camera's motion when motion fidelity is measured
    out: Path | None = None  # a folder for the report; None: no report
    overwrite: bool = False
    fps: float = 8.0  # the frame rate of the clips in the report


def evaluate_clips_loaded(
    runner: Painter,
    settings: ClipEvaluationSettings = ClipEvaluationSettings(),
    progress: Progress | None = None,
    kept: KeptClips | None = None,
) -> ClipReport:
    """Judges the concepts loaded in `runner` (a motion, a subject, or one of each) in clips, and writes the report to
    `settings.out` if that is set.

    kept: a cache of clips that do not depend on the motion. These are the base model's clips and, if the motion has no
    learned weights, the clips whose prompts do not name the motion. To generate these clips only once, pass the same
    dict for all motions with which a subject is judged. The runner and the subject's strength must stay the same, and
    subjects that share a cache must have different names.

    Raises:
        ValueError: if other concepts are loaded, the clips or pictures cannot be found, or the model generates no clips
    """
    check_false_motion(settings.false_motion)
    check_folders(settings.clip, settings.dino)
    if runner.backbone.frames is None:
        raise ValueError(f"{runner.backbone.name} generates pictures, not clips")
    judged = _Judged.of(runner)
    prompts = load_clip_prompts(settings.prompts)
    texts = ClipTexts(prompts, judged.motion_name, judged.subject_name, judged.class_noun, settings.limit)
    files = _motion_clips(judged, settings.references)
    if judged.motion is not None and judged.motion.subject is None:  # the motion's noise prior also needs the clips
        runner.loaded[judged.motion_name] = replace(judged.motion, subject=Subject((), clips=files))
    scorer = _scorer(runner, judged, settings, files, texts, progress)
    frames = settings.sampling.frames or runner.backbone.frames
    wordless = settings.false_motion == "unnamed" and judged.is_wordless(runner)
    case = replace(
        _case(runner, judged, scorer, frames), acts_unnamed=wordless, still_named=settings.false_motion == "off"
    )
    shots = ClipShots(settings.seeds, settings.out, settings.overwrite, settings.fps, kept=kept)
    return evaluate_clips(_makers(runner, judged, settings, case), case, texts, scorer, shots, progress)


def check_false_motion(text: str) -> FalseMotion:
    """Returns `text` if it is a `FalseMotion`, and raises ValueError otherwise."""
    if text not in get_args(FalseMotion):
        raise ValueError(f"--false-motion: {unknown(text, get_args(FalseMotion), 'choice')}")
    return text  # type: ignore[return-value]


@dataclass(frozen=True)
class _Judged:
    """The concepts that are judged."""

    motion: Loaded | None
    subject: Loaded | None

    @staticmethod
    def of(runner: Painter) -> _Judged:
        """Takes the concepts from a runner. Raises ValueError unless it has one motion, one subject, or one of each."""
        by_kind = {name: loaded.concept.meta.kind for name, loaded in runner.loaded.items()}
        motions = [name for name, kind in by_kind.items() if kind == "motion"]
        subjects = [name for name, kind in by_kind.items() if kind in ("subject", "identity")]
        others = [f"{name} ({kind})" for name, kind in by_kind.items() if name not in (*motions, *subjects)]
        if others or len(motions) > 1 or len(subjects) > 1 or not by_kind:
            said = ", ".join(f"{name} ({kind})" for name, kind in by_kind.items()) or "none"
            raise ValueError(f"clips are judged with one motion, one subject, or one of each; given concepts: {said}")
        first = [runner.loaded[names[0]] if names else None for names in (motions, subjects)]
        return _Judged(*first)

    @property
    def motion_name(self) -> str:
        return self.motion.concept.meta.name if self.motion else ""

    @property
    def subject_name(self) -> str:
        return self.subject.concept.meta.name if self.subject else ""

    @property
    def moves(self) -> Loaded | None:
        """The concept that was learned from clips and determines how the subject moves: the motion or, without one, a
        subject that was learned together with its motion."""
        if self.motion is None and self.subject is not None and sources_of("clips", self.subject.concept.meta.recipe):
            return self.subject
        return self.motion

    @property
    def class_noun(self) -> str:
        return self.subject.concept.meta.class_noun if self.subject else ""

    def is_wordless(self, runner: Painter) -> bool:
        """Whether the motion has no words, trajectory or noise prior, so that prompts with and without its name give
        the same clips."""
        if self.motion is None:
            return False
        how = self.motion.concept.meta.learned_with.sampling
        placeholder = runner.backbone.placeholders.get(self.motion_name)
        acts = (how.trajectory and how.trajectory.points) or how.noise_prior
        return not acts and (placeholder is None or not placeholder.words.strip())

    @property
    def all(self) -> list[Loaded]:
        return [loaded for loaded in (self.subject, self.motion) if loaded is not None]


def _motion_clips(judged: _Judged, folder: Path | None) -> tuple[Path, ...]:
    """Returns the clips that the motion was learned from, or none if a subject was learned together with its motion and
    these clips are no longer there. In that case, only the subject is judged. Raises ValueError as `motion_clips` does."""
    if judged.moves is None:
        return ()
    try:
        return motion_clips(judged.moves, folder)
    except ValueError:
        if judged.motion is None and folder is None:
            return ()
        raise


def clip_score_line(score: Score) -> str:
    """Formats a headline score for clips as one line."""
    if score.key in ("motion_recognised", "motion_fidelity", "leakage"):
        return score_line(score, "true clips", "between the motion's clips")
    return score_line(score)


def clip_instruments(backbone: Backbone, clip: Path | None, dino: Path | None) -> Instruments:
    """Returns the instruments for this model's clips. Without folders, only a model with a world has instruments."""
    if not (clip or dino or backbone.world):
        return Instruments()
    return load_instruments(clip, dino, backbone.world and backbone.world.instruments, str(backbone.device))


def _scorer(
    runner: Painter,
    judged: _Judged,
    settings: ClipEvaluationSettings,
    files: Sequence[Path],
    texts: ClipTexts,
    progress: Progress | None,
) -> ClipScorer:
    world, side = runner.backbone.world, runner.backbone.resolution
    tools = clip_instruments(runner.backbone, settings.clip, settings.dino)
    reader = settings.reader or (load_path_reader(world.instruments) if world else None)
    recipe = judged.moves.concept.meta.recipe if judged.moves else {}
    clips = [read_motion(path, recipe, side) for path in files]
    thing = None
    if judged.subject is not None and tools.identity is not None:
        asked = EvaluationSettings(references=settings.pictures, gallery=settings.gallery, option="--pictures")
        thing = _thing(picture_case(runner, judged.subject, asked), tools, texts, progress)
    known = known_motion(files) if files else None
    same = judged.moves is not None and judged.moves is judged.subject
    return ClipScorer(tools, clips, known, reader, thing, settings.compensate_camera, same)


def _thing(case: Case, tools: Instruments, texts: ClipTexts, progress: Progress | None) -> Scorer:
    """Returns the picture scorer that decides whether a frame shows the subject. Its thresholds are derived from true
    pictures."""
    scorer = Scorer(
        case.references, tools, case.class_noun, case.name, case.gallery, case.fresh,
        through=case.through, masks=case.masks,
    )  # fmt: skip
    scorer.figures = true_figures(scorer, case, texts.of_pictures(), progress)
    return scorer


def _case(runner: Painter, judged: _Judged, scorer: ClipScorer, frames: int) -> ClipCase:
    metas = {loaded.concept.meta.name: loaded.concept.meta for loaded in judged.all}
    training = [m.metrics.get("training_seconds") for m in metas.values()]
    return ClipCase(
        motion=judged.moves.concept.meta.name if judged.moves else "",
        subject=judged.subject_name,
        class_noun=judged.class_noun,
        recipes={name: meta.learned_with.method for name, meta in metas.items()},
        backbone=public_name(runner.backbone.name),
        toy=runner.backbone.world is not None,
        ceiling=_ceiling(runner.backbone, scorer.known, scorer.reader, frames),
        concepts=[loaded.concept.path for loaded in judged.all if loaded.concept.path],
        training_seconds=sum(t for t in training if t) or None,
        metadata={name: json.loads(m.model_dump_json(exclude={"recipe"})) for name, m in metas.items()},
    )


def _ceiling(backbone: Backbone, known: KnownMotion | None, reader: PathReader | None, frames: int) -> float | None:
    if known is None or reader is None:
        return None
    through, key = (lambda pixels: round_trip(backbone, pixels)), backbone.autoencoder
    return recognition_ceiling(reader, known, frames, through=through, through_key=key)


def _makers(runner: Painter, judged: _Judged, settings: ClipEvaluationSettings, case: ClipCase) -> Makers:
    chosen = judged.motion or judged.subject
    assert chosen is not None
    sampling = settings.sampling.completed(chosen.concept.meta.learned_with.sampling)
    sampling = replace(sampling, frames=sampling.frames or runner.backbone.frames)

    def concept(texts: list[str], seeds: list[int], progress: Steps | None) -> Tensor:
        return runner.generate(texts, seeds, sampling, must_name=False, progress=progress)

    def base(texts: list[str], seeds: list[int], progress: Steps | None) -> Tensor:
        return runner.generate(texts, seeds, sampling, base=True, progress=progress)

    def off(texts: list[str], seeds: list[int], progress: Steps | None) -> Tensor:
        backbone, name = runner.backbone, judged.motion_name
        strength, loaded = backbone.strengths.get(name), runner.loaded[name]
        runner.loaded[name] = replace(loaded, reach=0.0)
        if strength is not None:
            backbone.set_strength(name, 0.0)
        try:
            return concept(texts, seeds, progress)
        finally:
            runner.loaded[name] = loaded
            if strength is not None:
                backbone.set_strength(name, strength)

    unnamed: Generate | None = None
    depends: dict[Kind, Hashable] = {"base": ("base", repr(sampling))}
    if judged.motion is not None and settings.false_motion != "none":
        unnamed = off if settings.false_motion == "off" else None if case.acts_unnamed else concept
        if unnamed is concept and not any(judged.motion.concept.tensors.values()):
            depends["unnamed"] = ("unnamed", judged.subject_name, repr(sampling))
    return Makers(concept, base, unnamed, depends)
