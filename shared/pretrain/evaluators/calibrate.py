"""Chooses how poses are compared, and measures the instruments' typical readings (`pcs toybox calibrate`).

This must be repeated whenever the evaluators or the autoencoder change. Only things from the training split are used,
so that no held-out thing influences the choice of checkpoints or instruments.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.io.outputs import check_file
from shared.metrics.crops import crop_embeddings
from shared.metrics.encoders import CropSettings, ImageEncoder, Instruments
from shared.metrics.freedom import pairs, pooled
from shared.metrics.scores import similarities
from shared.metrics.toybox import CALIBRATION, load_toybox, pose_encoders
from shared.pretrain.evaluators.reconstructions import load_vae, round_trip
from shared.toybox import world
from shared.toybox.evaluators.convnet import WEIGHTS, write_json
from shared.toybox.render import render
from shared.toybox.subjects import reference_scenes
from shared.toybox.true_renders import asked_scenes

#: The crop settings with which each encoder from `pose_encoders` is tried.
CROPS = (CropSettings(1.35, 24), CropSettings(1.6, 24))
PLACES = ("beach", "snow", "grass", "white studio")  # backgrounds, one per prompt
VIEWS = 6  # pictures per prompt


@dataclass(frozen=True)
class _Sets:
    """Sets of pictures of one thing. Each dictionary is keyed by the names of the sets.

    pictures: `[N, 3, 64, 64]` in [-1, 1], encoded and decoded by the autoencoder
    where: `[N, 8, 8]`, the probability that a cell shows the thing
    prompts: the prompt of each picture
    """

    pictures: dict[str, Tensor]
    where: dict[str, Tensor]
    prompts: dict[str, list[str]]


def calibrate(things: int = 12, seed: int = 0, out: Path = WEIGHTS / CALIBRATION) -> Iterator[str]:
    """Tries each encoder with all crop settings, and writes the best combination and the typical readings to `out`.

    The best combination is the one with the smallest error on pictures whose freedom is known. This freedom is 1 for
    another set of random views, and 0 for one pose at varying positions and for shifted copies of one picture.
    Yields lines to print. Raises ValueError if `out` cannot be written.
    """
    check_file(out, overwrite=True)
    instruments, vae = load_toybox(), load_vae(WEIGHTS / "backbone" / "vae")

    def through(pixels: Tensor) -> Tensor:
        return round_trip(vae, (pixels + 1) / 2) * 2 - 1

    rng = np.random.default_rng([seed, 91])
    chosen = [_thing(rng, number) for number in range(things)]
    sets = [_drawn(thing, [seed, number], through, instruments) for number, thing in enumerate(chosen)]
    tried = []
    for name, encoder in pose_encoders(instruments).items():
        for crops in CROPS:
            found = _tried(encoder, crops, sets)
            tried.append({"encoder": name, "crops": {"margin": crops.margin, "cells": crops.cells}, **found})
            yield f"{name:11} margin {crops.margin} cells {crops.cells}: " + _line(found)
    best = min(tried, key=lambda t: t["error"])
    same, other = _likeness(chosen, seed, through, instruments)
    typical = {"same": same, "other": other, "free": best["free"], "fixed": best["fixed"]}
    write_json(
        out,
        {
            "encoder": best["encoder"],
            "crops": best["crops"],
            "typical": {k: round(v, 5) for k, v in typical.items()},
            "things": things,
            "seed": seed,
            "tried": [{k: round(v, 4) if isinstance(v, float) else v for k, v in t.items()} for t in tried],
        },
    )
    yield f"chosen: {best['encoder']} on {best['crops']}; typical readings {typical}"


def _line(found: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.3f}" for k, v in found.items())


def _thing(rng: np.random.Generator, number: int) -> world.Thing:
    """Draws a random thing. Consecutive numbers cycle through all classes except faces."""
    names = [c for c in world.CLASSES if c != "face"]
    return world.sample_thing(rng, "train", class_name=names[number % len(names)], pattern=True, accessory="none")


def _drawn(thing: world.Thing, seed: Sequence[int], through: Any, instruments: Instruments) -> _Sets:
    """Draws five sets of pictures: random views (`free`), other random views (`other`), one pose (`fixed`), the same
    pose at varying positions (`places`), and shifted copies of one picture per prompt (`shifted`)."""
    asked = [{"background": place} for place in PLACES for _ in range(VIEWS)]
    four = [{"background": place} for place in PLACES for _ in range(4)]
    number, pose = int(1000 * seed[0] + seed[1]), 50_000 + int(seed[1])
    rng = np.random.default_rng([*seed, 92])
    still = asked_scenes(thing, four, number, pose, "train")
    moved = [
        replace(
            s, cameras=(replace(s.cameras[0], x=float(rng.uniform(-0.15, 0.15)), y=float(rng.uniform(-0.1, 0.12))),)
        )
        for s in still
    ]
    pictures = {
        "free": through(render(asked_scenes(thing, asked, number + 1, None, "train")).pixels * 2 - 1),
        "other": through(render(asked_scenes(thing, asked, number + 2, None, "train")).pixels * 2 - 1),
        "fixed": through(render(still).pixels * 2 - 1),
        "places": through(render(moved).pixels * 2 - 1),
    }
    pictures["shifted"] = shifted(pictures["fixed"][::4], rng)
    assert instruments.locator is not None
    where = {name: instruments.locator.where(p) for name, p in pictures.items()}
    prompts = {name: [a["background"] for a in (asked if name in ("free", "other") else four)] for name in pictures}
    return _Sets(pictures, where, prompts)


def shifted(pixels: Tensor, rng: np.random.Generator, copies: int = 4, most: int = 8) -> Tensor:
    """Makes `copies` copies of each picture in `[N, 3, H, W]` and shifts each copy randomly by up to `most` pixels,
    replicating borders. Returns `[N * copies, 3, H, W]`."""
    height, width = pixels.shape[2:]
    padded = torch.nn.functional.pad(pixels, (most,) * 4, mode="replicate")
    out = []
    for picture in padded:
        for _ in range(copies):
            y, x = (int(v) for v in rng.integers(0, 2 * most + 1, 2))
            out.append(picture[:, y : y + height, x : x + width])
    return torch.stack(out)


def _tried(encoder: ImageEncoder, crops: CropSettings, sets: Sequence[_Sets]) -> dict[str, float]:
    """Returns the mean distances within the `free` and `fixed` sets, and the freedoms of the other sets, all averaged
    over things. For each thing, distances are scaled to freedoms, so that `free` has freedom 1 and `fixed` has freedom
    0. `error` is the root mean square deviation of the freedoms from the correct values (1, 0 and 0)."""
    distances: dict[str, list[float]] = {}
    for of in sets:
        for name, pixels in of.pictures.items():
            embedded = crop_embeddings(encoder, pixels, of.where[name], crops)
            every = torch.ones(len(pixels), dtype=torch.bool)
            distances.setdefault(name, []).append(pooled(pairs(embedded, of.prompts[name], every).values()).mean)
    values = {name: np.array(found) for name, found in distances.items()}
    free, fixed = values["free"], values["fixed"]
    freedoms = {k: ((values[k] - fixed) / (free - fixed)).clip(0, 1) for k in ("other", "places", "shifted")}
    wrong = np.concatenate([1 - freedoms["other"], freedoms["places"], freedoms["shifted"]])
    means = {k: float(v.mean()) for k, v in {"free": free, "fixed": fixed, **freedoms}.items()}
    return {**means, "error": float(np.sqrt(np.square(wrong).mean()))}


def _likeness(things: Sequence[world.Thing], seed: int, through: Any, instruments: Instruments) -> tuple[float, float]:
    """Returns two mean likenesses to a thing's five references. The first is that of new pictures of the thing, and the
    second is that of pictures of another thing with the same class and colours."""
    assert instruments.identity is not None
    same, other = [], []
    for number, thing in enumerate(things):
        stranger = replace(thing, pattern_seed=(thing.pattern_seed or 0) + 1)
        shown = render(reference_scenes(thing, 5, seed + number)).pixels * 2 - 1
        references = instruments.identity.images(through(shown))
        for of, values in ((thing, same), (stranger, other)):
            asked = [{"background": place} for place in PLACES for _ in range(2)]
            drawn = render(asked_scenes(of, asked, 7000 + number, None, "train")).pixels * 2 - 1
            values += similarities(instruments.identity.images(through(drawn)), [references])[:, 0].tolist()
    return float(np.mean(same)), float(np.mean(other))
