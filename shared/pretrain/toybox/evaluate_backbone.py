"""Measures the quality of the toybox's model, for `pcs toybox evaluate`, `evaluate-clips` and `curve`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.config import absent, expanded, unknown
from shared.io.failures import of_the_machine
from shared.io.outputs import check_file, write_text
from shared.sampling.schedulers import DIFFUSION, named_scheduler
from shared.toybox.weights import backbone_path, motion_adapter_path, sampling_defaults


def open_pipeline(folder: str | None) -> Any:
    """Loads the diffusers pipeline in `folder`, or the shipped pipeline if `folder` is None. Raises ValueError if the
    pipeline is missing or broken."""
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    place = _place(folder)
    index = place / "model_index.json"
    if not index.is_file():
        why = "it has no model_index.json" if place.is_dir() else absent(place, "there is no such folder")
        raise ValueError(
            f"--backbone {str(place)!r} is not a diffusers folder: {why}. Omit the option to use the shipped model."
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        if kind != StableDiffusionPipeline.__name__:
            raise ValueError(f"it is a {kind}, but only a StableDiffusionPipeline can be judged")
        pipe = StableDiffusionPipeline.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # the folder may contain anything
        if of_the_machine(error):
            raise
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--backbone {str(place)!r} cannot be loaded: {why}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _place(folder: str | None) -> Path:
    return expanded(folder) if folder is not None else backbone_path()


@dataclass(frozen=True)
class JudgeSettings:
    """Settings for judging the model. `pictures` is the number of random captions; the other settings determine
    the model and how it is sampled."""

    pictures: int = 256
    guidance: float | None = None  # by default, the guidance of the shipped model
    steps: int = 25
    seed: int = 0
    backbone: str | None = None  # a diffusers folder; by default, the shipped backbone
    scheduler: str | None = None  # the name of a scheduler; by default, the backbone's own


def evaluate(settings: JudgeSettings, out: Path | None, card: bool, overwrite: bool = False) -> Iterator[str]:
    """Judges the model on random captions. With `card`, also measures the evaluators on new renders, and writes the
    model card. Yields lines to print.

    Raises ValueError if `out` exists and `overwrite` is not set, if `out` lies inside the model's folder, if `backbone` is
    not the folder of a Stable Diffusion pipeline, or if the scheduler is unknown.
    """
    from shared.pretrain.evaluators.judge_backbone import judge_backbone
    from shared.pretrain.evaluators.model_card import check_card, write_card

    if card:
        check_card()
    if out is not None:
        check_file(out, overwrite, [_place(settings.backbone)])
        out.parent.mkdir(parents=True, exist_ok=True)
    guidance = sampling_defaults()["guidance"] if settings.guidance is None else settings.guidance
    if settings.scheduler is not None and settings.scheduler not in DIFFUSION:
        raise ValueError(unknown(settings.scheduler, DIFFUSION, "scheduler"))
    pipe = open_pipeline(settings.backbone)
    if settings.scheduler is not None:
        pipe.scheduler = named_scheduler(settings.scheduler, pipe.scheduler.config)
    found = judge_backbone(pipe, n=settings.pictures, guidance=guidance, steps=settings.steps, seed=settings.seed)
    yield f"{settings.pictures} captions, guidance {guidance}, {settings.steps} steps, without selection"
    yield from _lines(found)
    if out:
        write_text(out, json.dumps(found, indent=1))
    if card:
        write_card(judge=found)
        yield f"card written to {backbone_path().parent / 'CARD.md'}"


def evaluate_clips(
    settings: JudgeSettings, work: Path | None, out: Path | None, overwrite: bool = False, adapter: Path | None = None
) -> Iterator[str]:
    """Judges a motion module on random clip captions: the one trained in `work`, the one in the folder `adapter`, or, if
    both are None, the shipped one. Yields lines to print.

    Raises ValueError if `out` exists and `overwrite` is not set, if `out` lies inside a folder that is read, or if there is
    no motion module.
    """
    from shared.pretrain.evaluators.judge_clips import judge_clips

    if out is not None:
        module = work or adapter or motion_adapter_path()
        check_file(out, overwrite, [_place(settings.backbone), module])
        out.parent.mkdir(parents=True, exist_ok=True)
    guidance = sampling_defaults()["guidance"] if settings.guidance is None else settings.guidance
    pipe = open_moving(settings.backbone, work, adapter)
    found = judge_clips(pipe, settings.pictures, guidance, settings.steps, settings.seed)
    yield f"{settings.pictures} captions, guidance {guidance}, {settings.steps} steps, without selection"
    yield from _lines(found)
    yield f"  {'still':12} {found['scores']['still']:.3f}"
    yield f"  most common errors: {', '.join(found['confusions']) or 'none'}"
    if out:
        write_text(out, json.dumps(found, indent=1))


def open_moving(backbone: str | None, work: Path | None, adapter: Path | None = None) -> Any:
    """Loads the toybox's `AnimateDiffPipeline` with the motion module trained in `work`, with the one in the folder
    `adapter` or, if both are None, with the shipped one. Raises ValueError if `adapter` is not a `MotionAdapter`."""
    from diffusers import AnimateDiffPipeline, MotionAdapter  # pyright: ignore[reportPrivateImportUsage]

    from shared.pretrain.toybox.motion_module import averaged

    if work is not None:
        pipe, module = averaged(work, _place(backbone))
    else:
        if adapter is not None and not (adapter / "config.json").is_file():
            raise ValueError(
                f"--motion-adapter {adapter}: not a folder of a diffusers MotionAdapter (no config.json in it)"
            )
        folder = motion_adapter_path() if adapter is None else adapter
        module = MotionAdapter.from_pretrained(str(folder), local_files_only=True)
        pipe = open_pipeline(backbone)
    return AnimateDiffPipeline(pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.unet, module, pipe.scheduler)


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    for name, bar in found["bars"].items():
        ceiling = found["instrument"].get(name)
        shown = f"   (on renders {ceiling:.3f})" if ceiling is not None else ""
        yield f"  {name:12} {bar['value']:.3f}   bar {bar['bar']:.2f}   {'met' if bar['met'] else 'NOT met'}{shown}"
    for name in ("kid", "kid_floor"):
        if name in found["scores"]:
            yield f"  {name:12} {found['scores'][name]:.4f}"


def extend_curve(work: Path, pictures: int, guidance: float | None) -> Iterator[str]:
    """Judges the snapshots of a run that are not yet on the training curve. Yields lines to print."""
    from shared.pretrain.evaluators.training_curve import SCORES, extend

    stated = sampling_defaults()["guidance"] if guidance is None else guidance
    for point in extend(work, pictures, stated):
        yield f"{point['pictures']:9,} pictures  " + "  ".join(f"{name} {point[name]:.3f}" for name in SCORES)
