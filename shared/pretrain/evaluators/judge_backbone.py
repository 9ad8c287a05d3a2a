"""Tests the shipped backbone against minimum scores (bars). The recognizer checks whether the pictures show what their
captions describe.

`python -m shared.pretrain.evaluators.judge_backbone --backbone FOLDER --out judge.json`
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.pretrain.evaluators.reconstructions import round_trip
from shared.toybox import world
from shared.toybox.captions import caption
from shared.toybox.evaluators.clip import image_features, load_clip
from shared.toybox.evaluators.convnet import write_json
from shared.toybox.evaluators.recognizer import Recognizer, load_recognizer
from shared.toybox.render import render

BARS = {
    "vae_psnr_db": 26.0,
    "class": 0.92,
    "background": 0.92,
    "main": 0.85,
    "both_colors": 0.70,
    "view": 0.75,
    "accessory": 0.70,
    "style": 0.70,
}


def judge_backbone(
    pipeline: Any, n: int = 256, guidance: float = 4.0, steps: int = 25, seed: int = 0, batch_size: int = 32
) -> dict[str, Any]:
    """Measures a toybox `StableDiffusionPipeline` against the bars.

    `n` random captions name the class, both colours, the background and the view, as well as the accessory and the
    style, if any. In addition, `n // 4` captions always name an accessory, and another `n // 4` captions always name a
    style. One picture is generated per caption, without selection.

    Returns:
        a dictionary with the settings and these entries:
        `scores`: the fractions recognized correctly, the PSNR in dB, the KID between generated pictures and new
            renders, and this KID's floor, which is the KID between two sets of renders
        `instrument`: the fractions recognized correctly on renders of the same scenes, which serve as the ceiling
        `bars`: for each bar, `value`, `bar` and `met`
        `met`: whether all bars are met
        `seconds`: the duration of the measurement
    """
    if n < 8:
        raise ValueError(f"n = {n} captions are too few; at least 8 are needed")
    started = time.monotonic()
    scenes, texts = captions(n, seed)
    pictures = generate(pipeline, texts, guidance, steps, seed, batch_size)
    drawn = render_all(scenes)
    recognizer = load_recognizer()
    scores = attribute_scores(recognizer, scenes, n, pictures)
    fresh = render_all(captions(n, seed + 1)[0][:n])
    scores |= distances(recognizer, pictures[:n], fresh, drawn[:n])
    scores["vae_psnr_db"] = psnr(fresh, round_trip(pipeline.vae, fresh))
    bars = {name: {"value": scores[name], "bar": bar, "met": scores[name] >= bar} for name, bar in BARS.items()}
    return {
        "n": n,
        "guidance": guidance,
        "steps": steps,
        "seed": seed,
        "scores": scores,
        "instrument": attribute_scores(recognizer, scenes, n, drawn),
        "bars": bars,
        "met": all(bar["met"] for bar in bars.values()),
        "seconds": round(time.monotonic() - started, 1),
    }


def captions(n: int, seed: int) -> tuple[list[world.Scene], list[str]]:
    """Samples `n` scenes of one thing each, another `n // 4` in which the thing has an accessory, and another `n // 4`
    in a style other than photo. Returns the scenes and their full captions."""
    rng = np.random.default_rng([seed, 101])
    scenes = []
    for index in range(n + 2 * (n // 4)):
        fixed: dict[str, Any] = {"two": False, "view": world.VIEWS[int(rng.integers(len(world.VIEWS)))]}
        if n <= index < n + n // 4:
            fixed["accessory"] = world.ACCESSORIES[1 + index % (len(world.ACCESSORIES) - 1)]
            fixed["view"] = ("front", "side")[int(rng.integers(2))]
        elif index >= n + n // 4:
            fixed["style"] = world.STYLES[1 + index % (len(world.STYLES) - 1)]
        scenes.append(world.sample_scene(rng, "train", **fixed))
    return scenes, [caption(scene, rng, full=True) for scene in scenes]


@torch.no_grad()
def generate(
    pipeline: Any, texts: Sequence[str], guidance: float, steps: int, seed: int, batch_size: int = 32
) -> Tensor:
    """Generates one picture per text, `[n, 3, H, W]` in [0, 1]. Each picture has its own seed, so the batch size has no
    effect."""
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)
    parts = []
    for start in range(0, len(texts), batch_size):
        chunk = list(texts[start : start + batch_size])
        seeds = [torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(chunk))]
        made = pipeline(
            chunk, guidance_scale=guidance, num_inference_steps=steps, generator=seeds, output_type="pt"
        ).images
        parts.append(made.float().cpu().clamp(0, 1))
    return torch.cat(parts)


def render_all(scenes: Sequence[world.Scene], batch_size: int = 32) -> Tensor:
    """Renders scenes to pictures, `[n, 3, 64, 64]` in [0, 1]."""
    return torch.cat(
        [render(list(scenes[i : i + batch_size])).pixels.float().cpu() for i in range(0, len(scenes), batch_size)]
    )


def truth(scene: world.Scene) -> dict[str, str]:
    """Returns the attributes that the recognizer should read from a scene's first thing."""
    thing = scene.things[0]
    return {
        "class": thing.class_name,
        "main": thing.main,
        "second": thing.second,
        "background": scene.background,
        "view": scene.view,
        "accessory": thing.accessory,
        "style": scene.style,
    }


def attribute_scores(
    recognizer: Recognizer, scenes: Sequence[world.Scene], n: int, pictures: Tensor
) -> dict[str, float]:
    """Returns the fraction of scenes in which each attribute is recognized correctly. The accessory is scored on
    all scenes that have one, the style on all scenes that are not photos, and the others on the first `n` scenes.
    """
    found, truths = recognizer.predict(pictures), [truth(scene) for scene in scenes]
    right = {name: np.array([a == b[name] for a, b in zip(found[name], truths, strict=True)]) for name in found}
    scores = {name: float(right[name][:n].mean()) for name in ("class", "background", "main", "second", "view")}
    scores["both_colors"] = float((right["main"] & right["second"])[:n].mean())
    for name, plain in (("accessory", "none"), ("style", "photo")):
        named = np.array([t[name] != plain for t in truths])
        scores[name] = float(right[name][named].mean())
        scores[f"{name}_captions"] = float(named.sum())
    return {name: round(value, 4) for name, value in scores.items()}


@torch.no_grad()
def distances(recognizer: Recognizer, pictures: Tensor, fresh: Tensor, others: Tensor) -> dict[str, float]:
    """Computes the KID between `pictures` and `fresh`, on the recognizer's features and on CLIP's. The keys that end in
    `_floor` contain the KID between `others` and `fresh`, both of which are sets of renders.
    """
    clip, _ = load_clip()
    result = {}
    for name, features in (("kid", recognizer.features), ("kid_clip", lambda p: image_features(clip, p))):
        real = features(fresh)
        scale = real.std(0).clamp(min=1e-4)
        result[name] = kid(features(pictures) / scale, real / scale)
        result[f"{name}_floor"] = kid(features(others) / scale, real / scale)
    return {name: round(value, 5) for name, value in result.items()}


def kid(x: Tensor, y: Tensor) -> float:
    """Returns the Kernel Inception Distance (Bińkowski et al., arXiv 1801.01401), which is the unbiased estimate of
    MMD² for features `[n, D]` and `[m, D]` with a cubic kernel.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB, averaged over pictures `[B, 3, H, W]` in [0, 1]."""
    error = (a - b).square().mean((1, 2, 3)).clamp(min=1e-10)
    return round(float((-10 * error.log10()).mean()), 3)


def main() -> None:
    """Runs this module's command line."""
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    from shared.toybox.weights import WEIGHTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", type=Path, default=WEIGHTS / "backbone")
    parser.add_argument("--out", type=Path)
    for name, kind, default in (
        ("n", int, 256),
        ("guidance", float, 4.0),
        ("steps", int, 25),
        ("seed", int, 0),
        ("threads", int, 1),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    pipeline = DiffusionPipeline.from_pretrained(str(given.backbone), local_files_only=True)
    result = judge_backbone(pipeline, given.n, given.guidance, given.steps, given.seed)
    for name, bar in result["bars"].items():
        print(f"{'ok  ' if bar['met'] else 'LOW '} {name:12} {bar['value']:7.3f}  bar {bar['bar']}")
    if given.out:
        write_json(given.out, result)


if __name__ == "__main__":
    main()
