"""Scoring concepts: which instruments, which references and look-alikes, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_image.evaluate import Case, evaluate
from pcs_image.prompts import load_prompts
from pcs_image.runner import Runner
from pcs_image.tasks import Plan, references
from shared.backbones import Backbone
from shared.concept import Concept
from shared.io.files import sha256
from shared.io.subjects import read_subject
from shared.metrics.encoders import load_instruments
from shared.metrics.report import Report, Score
from shared.metrics.scorer import Scorer
from shared.recipes import expand_phases
from shared.toybox import album
from shared.types import Subject


def training_scorers(
    planned: Plan, backbone: Backbone, clip: Path | None, dino: Path | None
) -> dict[str, Scorer] | None:
    """One scorer per subject for pictures made while training; None where none are made, or nothing can measure them.

    They know the references only, never the look-alikes that the finished concept is told from: what chooses the best
    checkpoint must not be what it is judged by.
    """
    toybox = backbone.name == "toybox"
    validates = any(p.train.validation.every for _, p in expand_phases(planned.recipe))
    if not validates or not (toybox or clip or dino):
        return None
    instruments = load_instruments(clip, dino, toybox, str(backbone.device))
    out = {}
    for name, subject in planned.subjects.items():
        out[name] = Scorer(
            references(subject, backbone.resolution),
            instruments,
            subject.class_noun,
            name,
            None,
            None,
            _expectations(planned, subject.class_noun),
        )
    return out


def _expectations(planned: Plan, class_noun: str) -> dict[str, Mapping[str, str]]:
    """What the toybox's recognizer should see in the validation prompts that are also in its prompt set."""
    known = {p.plain(class_noun): p.expects for p in load_prompts("toybox").prompts}
    prompts = [p for _, phase in expand_phases(planned.recipe) for p in phase.train.validation.prompts]
    said = [p.replace("{concept}", class_noun) for p in prompts]
    return {p: known[p] for p in said if p in known}


def evaluate_concept(
    runner: Runner,
    path: Path,
    prompts: str,
    out: Path,
    *,
    references: Path | None = None,
    gallery: Path | None = None,
    seeds: Sequence[int] = (0, 1),
    limit: int | None = None,
    clip: Path | None = None,
    dino: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Evaluate the one concept loaded in `runner`; its folder is `path`. Writes the report to `out`.

    Raises ValueError when the references are not to be found, or nothing is there to measure with.
    """
    (name, loaded) = next(iter(runner.loaded.items()))
    concept = loaded.concept
    toybox = runner.backbone.name == "toybox"
    subject = find_references(concept, path, references)
    known = album.shown_in(subject.images)
    side = runner.backbone.resolution
    case = Case(
        name=name,
        class_noun=concept.meta.class_noun,
        references=_pixels(subject, side),
        gallery=_gallery(gallery, side) if gallery else album.gallery(known) if known else None,
        fresh=album.fresh(known) if known else None,
        through=lambda pixels: _round_trip(runner.backbone, pixels),
        concept=path,
        recipe=str(concept.meta.recipe.get("method", "")),
        backbone=runner.backbone.name,
        training_seconds=concept.meta.metrics.get("training_seconds"),
        metadata=json.loads(concept.meta.model_dump_json(exclude={"recipe"})),
    )
    sampling = concept.meta.recipe.get("sampling", {})
    settings = {k: sampling.get(k) for k in ("steps", "guidance", "scheduler")}
    chosen = load_prompts(prompts or ("toybox" if toybox else "dreambench"), concept.meta.class_noun).first(limit)
    return evaluate(
        lambda texts, numbers: runner.generate(texts, numbers, must_name=False, **settings),
        lambda texts, numbers: runner.generate(texts, numbers, base=True, **settings),
        case,
        chosen,
        seeds=list(seeds),
        instruments=load_instruments(clip, dino, toybox, str(runner.backbone.device)),
        out=out,
        overwrite=overwrite,
        progress=progress,
    )


@torch.no_grad()
def _round_trip(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] as the model's autoencoder gives them back."""
    parts = [backbone.decode(backbone.latent_moments(p.to(backbone.device))[0]) for p in pixels.split(4)]
    return torch.cat(parts).float().clamp(-1, 1).cpu()


def find_references(concept: Concept, path: Path, folder: Path | None) -> Subject:
    """The pictures the concept was learned from: in `folder`, or in the folder of that name beside the concept.

    Raises ValueError when they are not there, or are others than the concept's (their hashes are in it).
    """
    settings: Any = concept.meta.recipe.get("subject") or concept.meta.recipe.get("subjects", {}).get(concept.meta.name)
    said = (settings or {}).get("images")
    beside = path.resolve().parent / Path(said).name if isinstance(said, str) else None
    source = folder or beside
    if source is None or (folder is None and not source.is_dir()):
        raise ValueError("give --references FOLDER: a concept holds the hashes of its pictures, not the pictures")
    subject = read_subject(source, concept.meta.class_noun)
    hashes = {r.sha256 for r in concept.meta.references}
    known = [p for p in subject.images if sha256(p) in hashes]
    if folder is None and len(known) < len(subject.images):
        raise ValueError(f"{source} holds other pictures than the concept was learned from: give --references FOLDER")
    return subject


def _pixels(subject: Subject, side: int) -> Tensor:
    return references(subject, side)


def _gallery(folder: Path, side: int) -> dict[str, Tensor]:
    """Folder of folders: name -> [n, 3, side, side]."""
    names = sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if not names:
        raise ValueError(f"{folder} holds no folders: a gallery has one folder of pictures per other thing")
    return {p.name: references(read_subject(p), side) for p in names}


def shown(score: Score) -> str:
    """A headline score as one line: value, interval, and the base model beside it."""
    if score.value is None:
        return "not measured"
    span = f" [{score.low:.3f}, {score.high:.3f}]" if score.low is not None and score.high is not None else ""
    base = f"   base model {score.base:.3f}" if score.base is not None else ""
    chance = f"   chance {score.chance:.3f}" if score.chance is not None else ""
    return f"{score.value:.3f}{span}{base}{chance}"
