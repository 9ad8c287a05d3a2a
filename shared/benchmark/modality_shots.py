"""Generates the pictures and clips of `pcs concept evaluate`, for the packages that register these modalities."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from shared.benchmark.modality import Asked, Made, Shot
from shared.io.denoising_progress import Steps, named, part_of
from shared.metrics.scorer import fill
from shared.runner.bars import Bars
from shared.runner.base import Runner
from shared.runner.judging import picture_case
from shared.sampling.settings import SamplingSettings

_AT_ONCE = 4

Write = Callable[[Tensor, Path], Path]  # pixels, and a path without an extension -> the written file


def shots_of(runner: Runner, asked: Asked, bars: Bars, write: Write, motion: str = "") -> Made:
    """Generates one shot per standard prompt and seed, using a runner with the concept loaded.

    motion: the name of a loaded motion. In prompts, it follows the concept's name
    """
    thing = f"<{asked.name}> <{motion}>" if motion else f"<{asked.name}>"
    chosen = [(p, s) for p in asked.standard.prompts for s in asked.seeds]
    texts, plain = ([fill(p.text, t, asked.class_noun) for p, _ in chosen] for t in (thing, asked.class_noun))
    seeds, sampling = [s for _, s in chosen], _sampling(runner, asked, motion or asked.name)
    with bars.counter() as counter:
        start = time.perf_counter()
        made = _all(runner, texts, seeds, sampling, named(counter, "with the concept"))
        seconds = (time.perf_counter() - start) / len(made)
        base = _all(runner, plain, seeds, sampling, named(counter, "without it"), True) if asked.floor else ()
    shots = []
    for i, (pixels, (prompt, seed)) in enumerate(zip(made, chosen, strict=True)):
        file = write(pixels, asked.out / f"{i:03d}-seed{seed}")
        shots.append(Shot(texts[i], plain[i], seed, as_frames(pixels), prompt.expects, file))
    floor = [
        Shot(plain[i], plain[i], seed, as_frames(pixels), prompt.expects)
        for i, (pixels, (prompt, seed)) in enumerate(zip(base, chosen, strict=False))
    ]
    return Made(picture_case(runner, runner.loaded[asked.name], asked.judged), shots, floor, seconds=seconds)


def as_frames(pixels: Tensor) -> Tensor:
    """Turns a picture ([3, H, W]) or a clip ([3, F, H, W]) into frames ([F, 3, H, W])."""
    return pixels[None] if pixels.ndim == 3 else pixels.transpose(0, 1)


def _sampling(runner: Runner, asked: Asked, name: str) -> SamplingSettings:
    """Returns the sampling settings of this concept's recipe, with the requested number of steps, if any."""
    learned = runner.loaded[name].concept.meta.learned_with.sampling
    return SamplingSettings(steps=asked.steps, frames=runner.backbone.frames).completed(learned)


def _all(
    runner: Runner,
    texts: Sequence[str],
    seeds: Sequence[int],
    sampling: SamplingSettings,
    progress: Steps | None,
    base: bool = False,
) -> Sequence[Tensor]:
    parts = []
    for start in range(0, len(texts), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        told = part_of(progress, start, len(texts[some]), len(texts))
        parts.append(
            runner.generate(texts[some], seeds[some], sampling, base=base, must_name=False, progress=told).float().cpu()
        )
    return list(torch.cat(parts))
