"""Writes the model card for the toybox's weights: what they contain, how they were trained and how accurate they are.

`python -m shared.pretrain.evaluators.model_card [--judge judge.json] [--clips clips.json]` measures the evaluators and
writes `weights/CARD.md` and `card.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.io.outputs import check_file, write_text
from shared.pretrain.evaluators import measure
from shared.pretrain.evaluators import training_curve as curve
from shared.pretrain.evaluators.measure_pose import measure_pose
from shared.pretrain.evaluators.model_card_page import page
from shared.pretrain.evaluators.reconstructions import load_vae, round_trip
from shared.toybox.evaluators.convnet import WEIGHTS, write_json

SPLITS = ("development", "reporting")


def measure_all(vae: torch.nn.Module | None, n: int = 600, seed: int = 0) -> dict[str, Any]:
    """Measures the evaluators' accuracies on clean renders and, if a `vae` is given, on its reconstructions of the
    renders. Returns a dictionary `{evaluator: {"clean": …, "vae": …}}`."""

    def through(pixels: Tensor) -> Tensor:
        assert vae is not None
        return round_trip(vae, pixels)

    ways = {"clean": None} if vae is None else {"clean": None, "vae": through}
    result: dict[str, Any] = {"recognizer": {}, "clip": {}, "pose": {}}
    result |= {f"{kind}_{split}": {} for kind in ("identity", "faces") for split in SPLITS}
    for way, degrade in ways.items():
        result["recognizer"][way] = measure.measure_recognizer(n, seed, degrade)
        for split in SPLITS:
            result[f"identity_{split}"][way] = measure.measure_identity(split, seed=seed, degrade=degrade)
            result[f"faces_{split}"][way] = measure.measure_identity(split, seed=seed, degrade=degrade, faces=True)
        result["clip"][way] = measure.measure_clip(max(64, n // 2), seed, degrade)
        result["pose"][way] = measure_pose(n, seed, degrade)
    return result


def describe(weights: Path = WEIGHTS) -> dict[str, Any]:
    """Returns the sizes, in bytes, of the networks in `weights`, and facts about their training."""
    folders = (
        sorted(f for f in weights.iterdir() if f.is_dir() and not f.name.startswith(".")) if weights.is_dir() else []
    )
    sizes = {f.name: sum(p.stat().st_size for p in f.rglob("*") if p.is_file()) for f in folders}
    trainings = {
        f.name: json.loads((f / "training.json").read_text("utf-8")) for f in folders if (f / "training.json").is_file()
    }
    return {"bytes": sizes, "bytes_in_all": sum(sizes.values()), "trainings": trainings}


def check_card(weights: Path = WEIGHTS) -> None:
    """Raises ValueError if the card's files in `weights` cannot be written."""
    for name in ("card.json", "CARD.md"):
        check_file(weights / name, overwrite=True)


def write_card(
    n: int = 600,
    seed: int = 0,
    judge: dict[str, Any] | None = None,
    weights: Path = WEIGHTS,
    keep: bool = False,
    clips: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measures the evaluators and writes `card.json` and `CARD.md` into `weights`.

    judge, clips: the results of `judge_backbone` and `judge_clips`. If None, those of the previous card are kept.
    keep: whether to keep the previous card's accuracies, `n` and `seed`. Otherwise, the accuracies are measured again,
        which takes minutes.

    Raises ValueError if there is no previous card to keep, or whenever `check_card` does.
    """
    check_card(weights)
    path, backbone = weights / "card.json", weights / "backbone" / "vae"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    if keep and not before:
        raise ValueError(f"there are no accuracies to keep, because {path} does not exist; measure them without --keep")
    if keep:
        n, seed, accuracies = before["fresh_renders"], before["seed"], before["accuracies"]
    else:
        vae = load_vae(backbone) if (backbone / "config.json").is_file() else None
        accuracies = measure_all(vae, n, seed)
    card = {"fresh_renders": n, "seed": seed, **describe(weights), "accuracies": accuracies}
    card["judge"] = judge or before.get("judge")
    card["clips"] = clips or before.get("clips")
    card["curve"] = curve.read(weights)
    write_json(path, card)
    write_text(weights / "CARD.md", page(card))
    return card


def main() -> None:
    """Runs this module's command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--judge", type=Path, help="JSON written by `shared.pretrain.evaluators.judge_backbone`")
    parser.add_argument("--clips", type=Path, help="JSON written by `pcs toybox evaluate-clips --out`")
    parser.add_argument("--keep", action="store_true", help="keep the card's current accuracies")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    judge = json.loads(given.judge.read_text("utf-8")) if given.judge else None
    clips = json.loads(given.clips.read_text("utf-8")) if given.clips else None
    print(page(write_card(given.n, given.seed, judge, keep=given.keep, clips=clips)))


if __name__ == "__main__":
    main()
