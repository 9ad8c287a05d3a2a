"""Trains an evaluator in a seeded, resumable run. Training all evaluators takes about an hour on a CPU.

`python -m shared.pretrain.evaluators.train recognizer --data FOLDER --work FOLDER` (see `--help`) writes a checkpoint
and a log to `work` and, when the run ends or pauses, fp16 weights to `out`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.pretrain.evaluators.data import IdentityPictures, Pictures
from shared.pretrain.evaluators.pose_task import PoseTask, poses_of
from shared.pretrain.evaluators.tasks import ClipTask, EvaluatorTask, EvaluatorTraining, IdentityTask, RecognizerTask
from shared.pretrain.run_task import Outcome, RunSettings, refuse_older, run_task
from shared.pretrain.task import Compute
from shared.toybox import tokenizer
from shared.toybox.evaluators.convnet import WEIGHTS, write_json
from shared.toybox.evaluators.identity import IdentityConfig
from shared.toybox.evaluators.pose import PoseConfig
from shared.toybox.evaluators.recognizer import load_recognizer
from shared.train import checkpoint

TRAINING = "training.json"


@dataclass(frozen=True)
class Folders:
    """The folders that a training run reads and writes.

    data: the folder with the data set or, for the identity encoder, a folder written by `data.build_identity`
    out: the folder for the weights. The identity encoder and the pose estimator start from the trunk of the `recognizer`
        in the same parent folder.
    work: the folder for the checkpoint and log
    reconstructions: an .npy file with the first pictures of `data`, encoded and decoded by the autoencoder
    """

    data: Path
    out: Path
    work: Path
    reconstructions: Path | None = None


def train_evaluator(name: str, folders: Folders, run: RunSettings, settings: EvaluatorTraining | None = None) -> int:
    """Trains the evaluator `name`, which is a key of `TRAININGS`. Returns the total number of steps done."""
    training = TRAININGS[name]
    return fit(training.build(folders, settings or training.settings, run.compute()), run, folders)


def fit(task: EvaluatorTask, run: RunSettings, folders: Folders) -> int:
    """Trains `task` and writes its weights. Returns the total number of steps done.

    With `run.resume`, training continues from the checkpoint in `work`. Without a checkpoint, it continues from the
    weights in `out`, if there are any, with a new optimizer.
    """
    refuse_older(folders.work / "checkpoint.safetensors")
    first = adopt(task, folders.out) if run.resume and checkpoint.load(folders.work) is None else 0
    outcome = run_task(task, run, folders.work, first)
    if outcome.taken or written_steps(folders.out) != outcome.step:
        task.export(folders.out)
        write_json(folders.out / TRAINING, {**facts(task.settings, run, outcome), "flags": list(task.flags)})
    return outcome.step


def facts(settings: EvaluatorTraining, run: RunSettings, outcome: Outcome) -> dict[str, Any]:
    """Returns the facts about a training run that the model card states (the settings, the progress and the last
    losses)."""
    return {
        "done": outcome.step,
        "pictures": outcome.pictures,
        "steps": run.steps,
        "batch_size": settings.batch_size,
        "lr": settings.lr,
        "decay": settings.optimizer.decay,
        "weight_decay": settings.optimizer.weight_decay,
        "seed": settings.seed,
        "bf16": run.compute().bf16,
        "losses": {name: round(value, 4) for name, value in outcome.losses.items()},
    }


def adopt(task: EvaluatorTask, out: Path) -> int:
    """Loads the weights in `out` and returns the step at which they were written. Returns 0 if there are no weights, or
    if they have a different architecture."""
    done = written_steps(out)
    return done if done and task.adopt(out) else 0


def written_steps(out: Path) -> int | None:
    """Returns the step at which the weights in `out` were written, or None if there are no weights."""
    file = out / TRAINING
    return int(json.loads(file.read_text("utf-8"))["done"]) if file.is_file() else None


def _recognizer(folders: Folders, settings: EvaluatorTraining, compute: Compute) -> EvaluatorTask:
    return RecognizerTask(Pictures.load(folders.data, folders.reconstructions), settings, compute)


def _identity(folders: Folders, settings: EvaluatorTraining, compute: Compute) -> EvaluatorTask:
    start = load_recognizer(folders.out.parent / "recognizer")
    pictures = IdentityPictures.load(folders.data, folders.reconstructions)
    return IdentityTask(pictures, settings, compute, IdentityConfig(trunk=start.config.trunk), start)


def _clip(folders: Folders, settings: EvaluatorTraining, compute: Compute) -> EvaluatorTask:
    return ClipTask(Pictures.load(folders.data, folders.reconstructions), settings, compute, tokenizer.build())


def _pose(folders: Folders, settings: EvaluatorTraining, compute: Compute) -> EvaluatorTask:
    start = load_recognizer(folders.out.parent / "recognizer")
    pictures = Pictures.load(folders.data, folders.reconstructions)
    poses = poses_of(folders.data, len(pictures.pixels))
    return PoseTask(pictures, poses, settings, compute, PoseConfig(trunk=start.config.trunk), start)


@dataclass(frozen=True)
class Training:
    """The defaults for training an evaluator."""

    build: Callable[[Folders, EvaluatorTraining, Compute], EvaluatorTask]
    steps: int
    settings: EvaluatorTraining


TRAININGS: dict[str, Training] = {
    "recognizer": Training(_recognizer, 12_000, EvaluatorTraining(batch_size=64, lr=1.5e-3)),
    "identity": Training(_identity, 4000, EvaluatorTraining()),
    "clip": Training(_clip, 4000, EvaluatorTraining(lr=1e-3)),
    "pose": Training(_pose, 4000, EvaluatorTraining(batch_size=64)),
}


def main() -> None:
    """Runs this module's command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(TRAININGS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reconstructions", type=Path)
    parser.add_argument("--fresh", action="store_true", help="ignore any checkpoint in --work and weights in --out")
    parser.add_argument(
        "--thaw",
        action="store_true",
        help="for identity, also train the trunk taken from the recognizer (second round)",
    )
    parser.add_argument("--threads", type=int, default=1)
    kinds = {"steps": int, "batch_size": int, "lr": float, "seed": int, "minutes": float, "device": str}
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind)
    given = parser.parse_args()
    training = TRAININGS[given.name]
    changed = {k: v for k in ("batch_size", "lr", "seed") if (v := getattr(given, k)) is not None}
    run = RunSettings(given.steps or training.steps, given.minutes, None, not given.fresh, given.threads, given.device)
    folders = Folders(given.data, given.out or WEIGHTS / given.name, given.work, given.reconstructions)
    train_evaluator(given.name, folders, run, replace(training.settings, thaw=given.thaw, **changed))


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
