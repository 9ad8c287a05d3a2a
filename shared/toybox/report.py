"""Showing and measuring the toybox: `pcs toybox evaluate` and `pcs toybox sheet`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.config import unknown
from shared.io.files import write_text
from shared.toybox.weights import backbone_path, sampling_defaults

SOURCES = ("world", "model", "vae")


def open_pipeline(folder: str | None) -> Any:
    """The shipped diffusers pipeline, or another folder's."""
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    pipe = StableDiffusionPipeline.from_pretrained(folder or str(backbone_path()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate(
    out: Path | None, pictures: int, guidance: float | None, steps: int, seed: int, backbone: str | None, card: bool
) -> Iterator[str]:
    """Judge the model on random captions, and (with `card`) the evaluators on fresh renders. Yields lines to print."""
    from shared.toybox.evaluators.card import write_card
    from shared.toybox.evaluators.judge import judge_backbone

    stated = sampling_defaults()["guidance"] if guidance is None else guidance
    found = judge_backbone(open_pipeline(backbone), n=pictures, guidance=stated, steps=steps, seed=seed)
    yield f"{pictures} captions, guidance {stated}, {steps} steps, nothing selected"
    for name, bar in found["bars"].items():
        ceiling = found["instrument"].get(name)
        shown = f"   (on renders {ceiling:.3f})" if ceiling is not None else ""
        yield f"  {name:12} {bar['value']:.3f}   bar {bar['bar']:.2f}   {'met' if bar['met'] else 'NOT met'}{shown}"
    for name in ("kid", "kid_floor"):
        if name in found["scores"]:
            yield f"  {name:12} {found['scores'][name]:.4f}"
    if out:
        write_text(out, json.dumps(found, indent=1))
    if card:
        write_card(judge=found)
        yield f"card written to {backbone_path().parent / 'CARD.md'}"


def extend_curve(work: Path, pictures: int, guidance: float | None) -> Iterator[str]:
    """Judge the snapshots of a run that the curve over training lacks. Yields lines to print."""
    from shared.toybox.evaluators.curve import SCORES, extend

    stated = sampling_defaults()["guidance"] if guidance is None else guidance
    for point in extend(work, pictures, stated):
        yield f"{point['pictures']:9,} pictures  " + "  ".join(f"{name} {point[name]:.3f}" for name in SCORES)


def draw_sheet(
    out: Path, source: str, rows: int, columns: int, seed: int, guidance: float | None, prompts: Sequence[str]
) -> Path:
    """A captioned sheet of renders, of the model's pictures, or of renders beside their autoencoded selves."""
    from shared.toybox.captions import caption
    from shared.toybox.evaluators.judge import generate
    from shared.toybox.render import render
    from shared.toybox.sheet import sheet
    from shared.toybox.world import sample_scene

    if source not in SOURCES:
        raise ValueError(unknown(source, SOURCES, "source"))
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(rows * columns)]
    texts = [caption(s, rng, full=source == "model" and len(s.things) == 1) for s in scenes]
    if source == "model":
        texts = list(prompts) or texts
        stated = sampling_defaults()
        pixels = generate(open_pipeline(None), texts, guidance or stated["guidance"], stated["steps"], seed)
    else:
        pixels = render(scenes).pixels
    if source == "vae":
        pixels, texts = _beside(pixels), [t for t in texts for _ in range(2)]
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet(pixels, columns, texts).save(out)
    return out


def _beside(pixels: Tensor) -> Tensor:
    """[N, …] -> [2 N, …]: every picture, then the same after the autoencoder."""
    from shared.toybox.evaluators.data import load_vae, round_trip

    decoded = round_trip(load_vae(backbone_path() / "vae"), pixels)
    return torch.stack([pixels, decoded], 1).flatten(0, 1)
