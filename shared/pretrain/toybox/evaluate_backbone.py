"""Showing and measuring the toybox: `pcs toybox evaluate`, `sheet`, and held-out styles as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.config import expanded, unknown
from shared.io.contact_sheets import write_picture
from shared.io.outputs import atomic_folder, check_file, write_text
from shared.toybox.captions import SEEN, background_phrase, describe
from shared.toybox.subjects import style_scenes
from shared.toybox.weights import backbone_path, sampling_defaults

SOURCES = ("world", "model", "vae")


def open_pipeline(folder: str | None) -> Any:
    """The shipped diffusers pipeline, or another folder's. ValueError when there is none, or it cannot be loaded."""
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    place = expanded(folder) if folder is not None else backbone_path()
    index = place / "model_index.json"
    if not index.is_file():
        why = "it has no model_index.json" if place.is_dir() else "there is no such folder"
        raise ValueError(
            f"--backbone {str(place)!r} is not a diffusers folder: {why}. Leave it out for the shipped one."
        )
    try:
        kind = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        if kind != StableDiffusionPipeline.__name__:
            raise ValueError(f"it is a {kind}, and a StableDiffusionPipeline can be judged")
        pipe = StableDiffusionPipeline.from_pretrained(str(place), local_files_only=True)
    except Exception as error:  # whatever lies in the folder
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"--backbone {str(place)!r} cannot be loaded: {why}") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def evaluate(
    out: Path | None,
    pictures: int,
    guidance: float | None,
    steps: int,
    seed: int,
    backbone: str | None,
    card: bool,
    overwrite: bool = False,
) -> Iterator[str]:
    """Judge the model on random captions, and (with `card`) the evaluators on fresh renders. Yields lines to print.

    ValueError when `out` exists, unless `overwrite`, and when `backbone` is no folder of a Stable Diffusion pipeline.
    """
    from shared.pretrain.evaluators.judge_backbone import judge_backbone
    from shared.pretrain.evaluators.model_card import write_card

    if out is not None:
        check_file(out, overwrite)
        out.parent.mkdir(parents=True, exist_ok=True)
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
    from shared.pretrain.evaluators.training_curve import SCORES, extend

    stated = sampling_defaults()["guidance"] if guidance is None else guidance
    for point in extend(work, pictures, stated):
        yield f"{point['pictures']:9,} pictures  " + "  ".join(f"{name} {point[name]:.3f}" for name in SCORES)


def draw_sheet(
    out: Path,
    source: str,
    rows: int,
    columns: int,
    seed: int,
    guidance: float | None,
    prompts: Sequence[str],
    overwrite: bool = False,
) -> Path:
    """A captioned sheet of renders, of the model's pictures, or of renders beside their autoencoded selves.

    ValueError for an unknown source, for what only the model heeds (`guidance`, `prompts`) with another source, when
    `out` is a folder, and when it exists, unless `overwrite`.
    """
    from shared.pretrain.evaluators.judge_backbone import generate
    from shared.toybox.captioned_sheet import sheet
    from shared.toybox.captions import caption
    from shared.toybox.render import render
    from shared.toybox.world import sample_scene

    unheeded = [name for name, value in (("--prompt", prompts), ("--guidance", guidance is not None)) if value]
    _check_sheet(out, source, unheeded, overwrite)
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(rows * columns)]
    texts = [caption(s, rng, full=source == "model" and len(s.things) == 1) for s in scenes]
    if source == "model":
        texts = list(prompts) or texts
        stated = sampling_defaults()
        pixels = generate(
            open_pipeline(None), texts, stated["guidance"] if guidance is None else guidance, stated["steps"], seed
        )
    else:
        pixels = render(scenes).pixels
    if source == "vae":
        pixels, texts = _beside(pixels), [t for t in texts for _ in range(2)]
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_picture(sheet(pixels, columns, texts), out)


def _check_sheet(out: Path, source: str, only_for_model: Sequence[str], overwrite: bool) -> None:
    if source not in SOURCES:
        raise ValueError(unknown(source, SOURCES, "source"))
    if source != "model" and only_for_model:
        raise ValueError(
            f"{' and '.join(only_for_model)} with --source {source}: only the model heeds it, add --source model"
        )
    if out.suffix.lower() != ".png" and not out.is_dir():
        raise ValueError(f"{out}: a sheet is a PNG, give it a name that ends in .png")
    check_file(out, overwrite)


def write_style(name: str, folder: Path, n: int = 5, seed: int = 0, overwrite: bool = False) -> list[Path]:
    """Write n pictures in a held-out style (`development-mosaic` …), of n different things, to learn the style from.

    Each says in its PNG text which style it shows; beside it lies a caption of what is drawn (`NAME.txt`), which does
    not say how it is drawn.
    """
    from shared.toybox.render import render

    scenes = style_scenes(name, n, seed)
    drawn = render(scenes).pixels * 2 - 1
    with atomic_folder(folder, overwrite) as out:
        for i, scene in enumerate(scenes):
            write_picture(drawn[i], out / f"{i:02d}.png", {"toybox-style": name})
            seen = f", {SEEN[scene.view][0]}" if scene.cameras[0].view_is_clear else ""
            drawn_is = f"{describe(scene.things[0], 'none')} {background_phrase(scene.background)}{seen}"
            (out / f"{i:02d}.txt").write_text(drawn_is + "\n", "utf-8")
    return [folder / f"{i:02d}.png" for i in range(n)]


def _beside(pixels: Tensor) -> Tensor:
    """[N, …] -> [2 N, …]: every picture, then the same after the autoencoder."""
    from shared.pretrain.evaluators.data import load_vae, round_trip

    decoded = round_trip(load_vae(backbone_path() / "vae"), pixels)
    return torch.stack([pixels, decoded], 1).flatten(0, 1)
