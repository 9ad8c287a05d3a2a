"""Scoring concepts: which instruments, which references and look-alikes, and the report."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_image.evaluate import Case, evaluate
from pcs_image.prompts import load_prompts
from pcs_image.runner import Loaded, Runner
from pcs_image.tasks import Plan, references
from shared.backbones import Backbone
from shared.concept import Concept
from shared.config import unknown
from shared.io.files import sha256
from shared.io.subjects import read_subject
from shared.metrics.encoders import load_instruments
from shared.metrics.report import Report, Score
from shared.metrics.scorer import Scorer
from shared.recipes import expand_phases
from shared.sampling.sampler import DECODE_PIXELS, decoded, rows_at_once
from shared.toybox import album
from shared.types import Subject


def check_folders(clip: Path | None, dino: Path | None) -> None:
    """ValueError when a folder to score with is given and is not there."""
    for option, folder in (("--clip", clip), ("--dino", dino)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} {folder}: there is no such folder")


def training_scorers(
    planned: Plan, backbone: Backbone, clip: Path | None, dino: Path | None
) -> dict[str, Scorer] | None:
    """One scorer per subject for pictures made while training; None where none are made, or nothing can measure them.

    They know the references only, never the look-alikes that the finished concept is told from: what chooses the best
    checkpoint must not be what it is judged by.
    """
    check_folders(clip, dino)
    toybox = backbone.name == "toybox"
    if not any(p.train.validation.every for _, p in expand_phases(planned.recipe)):
        if clip or dino:
            warnings.warn(
                "--clip and --dino score the pictures made while training, and none are made: "
                "set train.validation.every=100, for example",
                stacklevel=2,
            )
        return None
    if not (toybox or clip or dino):
        warnings.warn(
            "pictures are made while training (train.validation.every), but nothing can score them, so the last state "
            "is kept, not the best: give --clip FOLDER or --dino FOLDER",
            stacklevel=2,
        )
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


def evaluate_concept(runner: Runner, path: Path, prompts: str, out: Path, **settings: Any) -> Report:
    """Evaluate the one concept loaded in `runner`; its folder is `path`. Writes the report to `out`.

    `settings` are those of `evaluate_loaded`, which see for what is raised.
    """
    return evaluate_loaded(runner, next(iter(runner.loaded)), prompts, path=path, out=out, **settings)


def evaluate_loaded(
    runner: Runner,
    name: str,
    prompts: str = "",
    *,
    path: Path | None = None,
    out: Path | None = None,
    references: Path | None = None,
    gallery: Path | None = None,
    seeds: Sequence[int] = (0, 1),
    limit: int | None = None,
    clip: Path | None = None,
    dino: Path | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Evaluate the concept `name` of those loaded in `runner`; with `out`, the report is written there.

    Args:
        prompts: a prompt set or a file; "" is the backbone's own set
        path: the concept's folder, for its size and for the references beside it; default where it was read from
        references: a folder; default the pictures it was learned from
        gallery: a folder of folders with pictures of other things of the class
        limit: only the first prompts of the set
        steps, guidance, scheduler: default those of the concept's recipe

    Raises:
        ValueError: the concept is not loaded, its references are not to be found, or nothing is there to measure with
    """
    if name not in runner.loaded:
        raise ValueError(f"there is no concept {unknown(name, list(runner.loaded), 'concept')}")
    check_folders(clip, dino)
    loaded = runner.loaded[name]
    toybox = runner.backbone.name == "toybox"
    sampling = loaded.concept.meta.recipe.get("sampling", {})
    asked = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
    settings = {k: sampling.get(k) if v is None else v for k, v in asked.items()}
    chosen = load_prompts(prompts or ("toybox" if toybox else "dreambench"), loaded.concept.meta.class_noun)
    return evaluate(
        lambda texts, numbers: runner.generate(texts, numbers, must_name=False, **settings),
        lambda texts, numbers: runner.generate(texts, numbers, base=True, **settings),
        _case(runner, loaded, path or loaded.concept.path, references, gallery),
        chosen.first(limit),
        seeds=list(seeds),
        instruments=load_instruments(clip, dino, toybox, str(runner.backbone.device)),
        out=out,
        overwrite=overwrite,
        progress=progress,
    )


def _case(runner: Runner, loaded: Loaded, path: Path | None, folder: Path | None, gallery: Path | None) -> Case:
    concept = loaded.concept
    subject = loaded.subject if folder is None else None
    subject = subject or find_references(concept, path, folder)
    known = album.shown_in(subject.images)
    side = runner.backbone.resolution
    return Case(
        name=concept.meta.name,
        class_noun=concept.meta.class_noun,
        references=references(subject, side),
        gallery=_gallery(gallery, side) if gallery else album.gallery(known) if known else None,
        fresh=album.fresh(known) if known else None,
        through=lambda pixels: _round_trip(runner.backbone, pixels),
        concept=path,
        recipe=str(concept.meta.recipe.get("method", "")),
        backbone=runner.backbone.name,
        training_seconds=concept.meta.metrics.get("training_seconds"),
        metadata=json.loads(concept.meta.model_dump_json(exclude={"recipe"})),
    )


@torch.no_grad()
def _round_trip(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] as the model's autoencoder gives them back."""
    size = pixels.shape[-2] * pixels.shape[-1]
    latents = [
        backbone.latent_moments(p.to(backbone.device))[0] for p in pixels.split(rows_at_once(size, DECODE_PIXELS))
    ]
    return decoded(backbone, torch.cat(latents), size).cpu()


def find_references(concept: Concept, path: Path | None, folder: Path | None) -> Subject:
    """The pictures the concept was learned from: in `folder`, or in the folder of that name beside the concept (`path`).

    Raises ValueError when they are not there, or are others than the concept's (their hashes are in it).
    """
    settings: Any = concept.meta.recipe.get("subject") or concept.meta.recipe.get("subjects", {}).get(concept.meta.name)
    said = (settings or {}).get("images")
    beside = path.resolve().parent / Path(said).name if path and isinstance(said, str) else None
    source = folder or beside
    if source is None or (folder is None and not source.is_dir()):
        raise ValueError("give --references FOLDER: a concept holds the hashes of its pictures, not the pictures")
    subject = read_subject(source, concept.meta.class_noun)
    hashes = {r.sha256 for r in concept.meta.references}
    known = [p for p in subject.images if sha256(p) in hashes]
    if folder is None and len(known) < len(subject.images):
        raise ValueError(f"{source} holds other pictures than the concept was learned from: give --references FOLDER")
    return subject


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
