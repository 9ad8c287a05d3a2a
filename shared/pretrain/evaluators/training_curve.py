"""Measures how the scores change over a training run. The run's snapshots are judged in the same way as the shipped
backbone, but usually on fewer captions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.io.outputs import check_file
from shared.pretrain.evaluators.judge_backbone import BARS, judge_backbone
from shared.pretrain.toybox import assemble
from shared.pretrain.toybox.run_folder import denoiser_facts, snapshot_facts, snapshots, training_folder
from shared.toybox.evaluators.convnet import WEIGHTS, write_json
from shared.train import checkpoint

SCORES = (*(name for name in BARS if name != "vae_psnr_db"), "kid")
CURVE = "curve.json"


def extend(work: Path, n: int, guidance: float, seed: int = 0, weights: Path = WEIGHTS) -> Iterator[dict[str, Any]]:
    """Adds the snapshots and the checkpoint of `work/run` to the curve in `weights/curve.json`. Judges only those whose
    steps are not yet on the curve.

    Args:
        n: the number of random captions; they are the ones that `judge_backbone` uses with the same seed
        guidance: the guidance used for every point

    Yields:
        each new point, which contains its step, its number of pictures and its `SCORES`

    Raises:
        ValueError: if there is neither a snapshot nor a checkpoint, if the curve was measured with other settings, or if it
            cannot be written
    """
    check_file(weights / CURVE, overwrite=True)
    run = work / "run"
    state = checkpoint.load(training_folder(run, "unet"))
    points: list[tuple[Path | None, dict[str, Any]]] = [(file, snapshot_facts(file)) for file in snapshots(run)]
    points += [] if state is None else [(None, denoiser_facts(state))]
    if not points:
        raise ValueError(f"{run} has neither a snapshot nor a checkpoint; train first (`pcs toybox train unet`)")
    settings = {"n": n, "guidance": guidance, "seed": seed}
    curve = read(weights) or {**settings, "points": []}
    if {k: curve[k] for k in settings} != settings:
        raise ValueError(
            f"{weights / CURVE} was measured with other settings; remove it, or use its settings ({curve})"
        )
    known = {point["step"] for point in curve["points"]}
    for snapshot, facts in points:
        if facts["step"] in known:
            continue
        pipeline = assemble.pipeline(run, snapshot)
        scores = judge_backbone(pipeline, n=n, guidance=guidance, seed=seed)["scores"]
        point = {"step": facts["step"], "pictures": facts["pictures"], **{k: round(scores[k], 4) for k in SCORES}}
        known.add(facts["step"])
        curve["points"] = sorted([*curve["points"], point], key=lambda p: p["step"])
        write_json(weights / CURVE, curve)
        yield point


def read(weights: Path = WEIGHTS) -> dict[str, Any] | None:
    """Returns the curve, which contains its settings (`n`, `guidance` and `seed`) and its `points`, sorted by step.
    Returns None if no point has been measured."""
    path = weights / CURVE
    return json.loads(path.read_text("utf-8")) if path.is_file() else None
