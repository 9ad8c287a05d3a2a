"""Scores concepts. Chooses the instruments, references and look-alikes, and writes the report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from shared.backbones import Backbone
from shared.concept import Concept
from shared.concept.provenance import public_name
from shared.config import absent, unknown
from shared.evaluation.evaluate import Case, KeptPictures, Shots, evaluate
from shared.evaluation.prompt_sets import REAL, load_prompts
from shared.io.cache import cache_folder
from shared.io.checksums import sha256
from shared.io.decode import Picture, read_mask, read_picture
from shared.io.read_subject import read_subject
from shared.io.resize import resize
from shared.io.terminal import encodable
from shared.metrics.instruments import known_thing, load_instruments
from shared.metrics.report import Report, Score
from shared.metrics.scorer import Scorer
from shared.recipe.phases import expand_phases
from shared.recipe.reads import sources_of
from shared.runner.loaded_concepts import Loaded, Painter
from shared.runner.plan import Plan
from shared.sampling.sampler import DECODE_PIXELS, decoded, images_per_batch
from shared.sampling.settings import SamplingSettings
from shared.types import Subject

FIRST_SEED = 10_000  # the first seed for pictures and clips that are generated and scored during training


def check_folders(clip: Path | None, dino: Path | None) -> None:
    """Raises ValueError if a folder given for scoring does not exist."""
    for option, folder in (("--clip", clip), ("--dino", dino)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} {folder}: {absent(folder, 'no such folder')}")


def training_scorers(
    planned: Plan, backbone: Backbone, clip: Path | None, dino: Path | None
) -> dict[str, Scorer] | None:
    """Returns one scorer per subject for the pictures generated during training, or None if no pictures are generated
    or no instrument is available.

    The scorers use only the references, and never the look-alikes with which the finished concept is compared, because
    the best checkpoint must not be chosen by the scores that judge the finished concept.
    """
    world_instruments = backbone.world and backbone.world.instruments
    if not makes_previews(planned, clip, dino):
        return None
    if not (world_instruments or clip or dino):
        warnings.warn(
            "pictures are generated during training (train.validation.every), but nothing can score them, so the last state "
            "is kept instead of the best: give --clip FOLDER or --dino FOLDER",
            stacklevel=2,
        )
        return None
    instruments = load_instruments(clip, dino, world_instruments, str(backbone.device))
    # Typical scores were measured on pictures and references that had passed through the autoencoder.
    through = (lambda pixels: round_trip(backbone, pixels)) if instruments.typical else None
    out = {}
    for name, subject in planned.subjects.items():
        out[name] = Scorer(
            references(subject, backbone.resolution),
            instruments,
            subject.class_noun,
            name,
            None,
            None,
            _expectations(planned, backbone, subject.class_noun),
            through,
        )
    return out


def makes_previews(planned: Plan, clip: Path | None, dino: Path | None) -> bool:
    """Returns whether training generates anything that could be scored. Warns if it generates nothing although a folder
    is given for scoring. Raises ValueError if a folder given for scoring does not exist."""
    check_folders(clip, dino)
    phases = [p for _, p in expand_phases(planned.recipe)]
    if any(p.train.validation.every or p.task.needs_scores for p in phases):
        return True
    if clip or dino:
        warnings.warn(
            "--clip and --dino score the pictures generated during training, but none are generated: "
            "set train.validation.every=100, for example",
            stacklevel=3,
        )
    return False


def _expectations(planned: Plan, backbone: Backbone, class_noun: str) -> dict[str, Mapping[str, str]]:
    """Returns what a recognizer should see for each validation prompt that is also in the prompt set of the backbone's
    world."""
    if backbone.world is None:
        return {}
    known = {p.plain(class_noun): p.expects for p in load_prompts(backbone.world.prompts).prompts}
    prompts = [p for _, phase in expand_phases(planned.recipe) for p in phase.train.validation.prompts]
    expanded = [p.replace("{concept}", class_noun) for p in prompts]
    return {p: known[p] for p in expanded if p in known}


@dataclass(frozen=True)
class EvaluationSettings:
    """The settings for judging a concept."""

    prompts: str = ""  # a prompt set ("toybox", "dreambench") or a file; "": the backbone's own set
    seeds: tuple[int, ...] = (0, 1)
    limit: int | None = None  # the number of prompts to use, from the start of the set; None: all
    # fields that are None come from the concept's recipe
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    references: Path | None = None  # a folder; default: the concept's training pictures, found next to its folder
    gallery: Path | None = None  # a folder with one folder of pictures per look-alike of the same class
    clip: Path | None = None  # the folder of a CLIP model to measure with
    dino: Path | None = None  # the folder of a DINO model to measure with
    path: Path | None = None  # the concept's folder, whose size is measured; default: the folder that it was read from
    out: Path | None = None  # a folder for the report; None: no report
    overwrite: bool = False
    base: dict[str, KeptPictures] | None = None  # evaluations that share this dict reuse the base model's pictures
    option: str = "--references"  # the command's option for `references`, named in errors


def evaluate_loaded(
    runner: Painter,
    name: str,
    settings: EvaluationSettings = EvaluationSettings(),
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Evaluates the loaded concept `name`, and writes the report to `settings.out` if that is set.

    Raises:
        ValueError: if the concept is not loaded, its references cannot be found, or no instrument is available
    """
    if name not in runner.loaded:
        raise ValueError(unknown(name, list(runner.loaded), "concept"))
    check_folders(settings.clip, settings.dino)
    loaded, backbone = runner.loaded[name], runner.backbone
    world = backbone.world
    sampling = settings.sampling.completed(loaded.concept.meta.learned_with.sampling)
    chosen = load_prompts(settings.prompts or (world.prompts if world else REAL), loaded.concept.meta.class_noun)
    kept = None if settings.base is None else settings.base.setdefault(repr(sampling), {})
    return evaluate(
        lambda texts, seeds, progress: runner.generate(texts, seeds, sampling, must_name=False, progress=progress),
        lambda texts, seeds, progress: runner.generate(texts, seeds, sampling, base=True, progress=progress),
        picture_case(runner, loaded, settings),
        chosen.first(settings.limit),
        load_instruments(settings.clip, settings.dino, world and world.instruments, str(backbone.device)),
        Shots(settings.seeds, settings.out, settings.overwrite, kept=kept),
        progress,
    )


def picture_case(runner: Painter, loaded: Loaded, settings: EvaluationSettings) -> Case:
    """Returns the case to judge, with everything that is known about its subject. Raises ValueError if the subject's
    pictures cannot be found."""
    concept, folder, gallery = loaded.concept, settings.references, settings.gallery
    path = settings.path or concept.path
    recipe = concept.meta.recipe
    if folder is None and sources_of("clips", recipe) and not sources_of("references", recipe):
        raise ValueError(
            f"{concept.meta.name} was learned from clips: give {settings.option} FOLDER with pictures of it"
        )
    subject = loaded.subject if folder is None else None
    subject = subject or find_references(concept, path, folder, settings.option)
    known = known_thing(subject.images)
    side = runner.backbone.resolution
    return Case(
        name=concept.meta.name,
        class_noun=concept.meta.class_noun,
        references=references(subject, side),
        masks=reference_masks(subject, side),
        gallery=_gallery(gallery, side) if gallery else known and known.gallery,
        fresh=known and known.fresh,
        through=lambda pixels: round_trip(runner.backbone, pixels),
        through_key=runner.backbone.autoencoder,
        true=known and known.true,
        cache=cache_folder(),
        concept=path,
        recipe=concept.meta.learned_with.method,
        backbone=public_name(runner.backbone.name),
        kind=concept.meta.kind,
        toy=runner.backbone.world is not None,
        training_seconds=concept.meta.metrics.get("training_seconds"),
        metadata=json.loads(concept.meta.model_dump_json(exclude={"recipe"})),
    )


@torch.no_grad()
def round_trip(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Returns pictures [N, 3, H, W] in [-1, 1] after encoding and decoding them with the model's autoencoder."""
    size = pixels.shape[-2] * pixels.shape[-1]
    latents = [
        backbone.latent_moments(p.to(backbone.device))[0] for p in pixels.split(images_per_batch(size, DECODE_PIXELS))
    ]
    return decoded(backbone, torch.cat(latents), size).cpu()


def find_references(concept: Concept, path: Path | None, folder: Path | None, option: str = "--references") -> Subject:
    """Finds the pictures that the concept was learned from, in `folder` or else in the recorded folder next to `path`.

    Raises ValueError if they are missing, or if the recorded folder contains a picture whose hash the concept does not
    store.
    """
    recorded = concept.meta.learned_with.folder_of(concept.meta.name)
    source = folder or (beside(path.resolve().parent, Path(recorded).name) if path and recorded else None)
    if source is None or (folder is None and not source.is_dir()):
        raise ValueError(
            f"give {option} FOLDER: a concept stores the hashes of its pictures, not the pictures themselves"
        )
    subject = read_subject(source, concept.meta.class_noun)
    hashes = {r.sha256 for r in concept.meta.references}
    known = [p for p in subject.images if sha256(p) in hashes]
    if folder is None and len(known) < len(subject.images):
        raise ValueError(f"{source} has pictures that the concept was not learned from: give {option} FOLDER")
    return subject


def beside(folder: Path, name: str) -> Path:
    """Returns the entry of `folder` whose name, either plain or escaped, is `name`."""
    matching = (p for p in sorted(folder.iterdir()) if encodable(p.name) == name)
    return folder / name if (folder / name).exists() else next(matching, folder / name)


def _gallery(folder: Path, side: int) -> dict[str, Tensor]:
    """Maps the name of each subfolder to its pictures, [n, 3, side, side]."""
    names = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not names:
        raise ValueError(f"{folder} contains no folders: a gallery has one folder of pictures per look-alike")
    return {p.name: references(read_subject(p), side) for p in names}


def score_line(score: Score, true_ones: str = "true pictures", among_each_other: str = "between references") -> str:
    """Formats a headline score as one line, with its interval and the values that it can be compared with."""
    if score.value is None:
        return "not measured"
    span = f" [{score.low:.3f}, {score.high:.3f}]" if score.low is not None and score.high is not None else ""
    base = f"   base model {score.base:.3f}" if score.base is not None else ""
    chance = f"   chance {score.chance:.3f}" if score.chance is not None else ""
    truth = f"   {true_ones} {score.truth:.3f}" if score.truth is not None else ""
    among = ""
    if score.among_low is not None and score.among_high is not None:
        among = f"   {among_each_other} {score.among_low:.3f} to {score.among_high:.3f}"
    direction = "   lower is better" if score.better == "lower" else ""
    return f"{score.value:.3f}{span}{base}{chance}{truth}{among}{direction}"


def references(subject: Subject, side: int) -> Tensor:
    """Returns the subject's pictures as [N, 3, side, side] in [-1, 1]."""
    return torch.stack([resize(read_picture(p), side).pixels for p in subject.images])


def reference_masks(subject: Subject, side: int) -> Tensor | None:
    """Returns the masks [N, side, side] in [0, 1], cropped as `references` does, or None if any picture has no mask."""
    if not all(p in subject.masks for p in subject.images):
        return None
    masks = [Picture(read_mask(subject.masks[p]).convert("RGB")) for p in subject.images]
    return torch.stack([resize(m, side).pixels[0].add(1).div(2) for m in masks])
