"""How the evaluators are trained: one loop, three tasks; seeded, resumable, on a CPU in about an hour together.

`python -m shared.pretrain.evaluators.train recognizer --data FOLDER --work FOLDER` (see `--help`); every task leaves a
checkpoint and a log in `work` and, at the end and on the way, fp16 weights in `out`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Generator, Tensor, nn

from shared.pretrain.evaluators.data import IdentityPictures, Pictures
from shared.pretrain.evaluators.losses import ClipTask, IdentityTask, RecognizerTask
from shared.pretrain.toybox import common
from shared.toybox import tokenizer
from shared.toybox.evaluators.convnet import WEIGHTS, write_json
from shared.toybox.evaluators.identity import IdentityConfig
from shared.toybox.evaluators.recognizer import load_recognizer

CHECKPOINT = "checkpoint.safetensors"
TRAINING = "training.json"


@dataclass(frozen=True)
class Settings:
    """One training: `steps` in all, pictures per step, peak `lr` of AdamW, the fraction of steps over which it falls
    to 0.

    minutes: pause after so long (with a checkpoint; `resume=True` goes on and gives the same weights as without a
    pause).
    pause: the same by a number of steps. device: by default the GPU if there is one.
    """

    steps: int
    batch_size: int = 128
    lr: float = 2e-3
    decay: float = 0.7
    warmup: int = 100
    weight_decay: float = 0.05
    seed: int = 0
    threads: int | None = 1
    save_every: int = 100
    minutes: float | None = None
    pause: int | None = None
    device: str | None = None
    bf16: bool = True


class Task(Protocol):
    """What is trained: the modules, the loss of a step, and how the result is written."""

    module: nn.Module
    flags: tuple[str, ...]
    """What its command was given beside the settings, for the card."""

    def loss(self, generator: Generator, device: torch.device, autocast: bool) -> dict[str, Tensor]:
        """Named terms; their sum is minimised."""
        ...

    def export(self, out: Path) -> None:
        """Writes the present weights, fp16."""
        ...

    def adopt(self, out: Path) -> bool:
        """Takes over what `export` wrote; False where that is another architecture."""
        ...


def fit(task: Task, settings: Settings, out: Path, work: Path, resume: bool = True) -> int:
    """Trains `task`; returns the number of steps done in all. `out` gets the weights, `work` checkpoint and log.

    resume: go on from the checkpoint in `work`, or else from the finished weights in `out` with a new optimizer.
    """
    common.set_threads(settings.threads)
    device = common.pick_device(settings.device)
    module = task.module.to(device).train()
    optimizer = torch.optim.AdamW(
        common.parameter_groups(module, settings.weight_decay), lr=settings.lr, betas=(0.9, 0.98)
    )
    first = (_restore(work / CHECKPOINT, module, optimizer, settings) or _adopt(task, out)) if resume else 0
    budget = common.Budget(steps=settings.steps, warmup=settings.warmup, decay=settings.decay)
    log, started, step = common.Log(work / "log.jsonl"), time.monotonic(), first
    for step in range(first, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * budget.rate(step, 0.0)
        terms = _update(task, module, optimizer, common.step_generator(settings.seed, step), device, settings.bf16)
        done = step + 1
        if done % 50 == 0 or done == settings.steps:
            speed = (done - first) * settings.batch_size / (time.monotonic() - started)
            log.write(
                step=done, pictures_per_s=round(speed, 1), **{name: round(float(v), 4) for name, v in terms.items()}
            )
        over = settings.minutes is not None and time.monotonic() - started > 60 * settings.minutes
        pause = over or (settings.pause is not None and done >= settings.pause)
        if pause or done == settings.steps or done % settings.save_every == 0:
            _save(work / CHECKPOINT, module, optimizer, done, settings)
            task.export(out)
            write_json(out / TRAINING, {**facts(settings, done, terms), "flags": list(task.flags)})
            module.train()
        if pause:
            break
    return step + 1 if settings.steps > first else first


def facts(settings: Settings, done: int, terms: dict[str, Tensor]) -> dict[str, Any]:
    """What the card says of a training: its numbers so far and its last losses."""
    kept = ("steps", "batch_size", "lr", "decay", "weight_decay", "seed", "bf16")
    return {
        "done": done,
        "pictures": done * settings.batch_size,
        **{name: getattr(settings, name) for name in kept},
        "losses": {name: round(float(value), 4) for name, value in terms.items()},
    }


def _update(
    task: Task,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: Generator,
    device: torch.device,
    bf16: bool,
) -> dict[str, Tensor]:
    terms = task.loss(generator, device, bf16)
    loss = torch.stack(list(terms.values())).sum()
    if not torch.isfinite(loss):
        raise ValueError(
            f"the loss is not finite ({ {k: float(v.detach()) for k, v in terms.items()} }); use a lower lr or bf16=False"
        )
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 5.0)
    optimizer.step()
    return {name: value.detach() for name, value in terms.items()}


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, settings: Settings) -> None:
    tensors = {"model": dict(module.state_dict()), "optimizer": common.optimizer_tensors(optimizer)}
    facts = {"step": step, "seed": settings.seed, "batch_size": settings.batch_size, "trained": _trained(module)}
    common.save_checkpoint(path, tensors, facts)


def _adopt(task: Task, out: Path) -> int:
    """Loads finished weights and returns the step they are at; 0 where there are none, or of other shapes."""
    known = out / TRAINING
    if not known.is_file() or not task.adopt(out):
        return 0
    return int(json.loads(known.read_text("utf-8"))["done"])


def _trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, settings: Settings) -> int:
    if not path.is_file():
        return 0
    tree, facts = common.load_checkpoint(path)
    for name in ("seed", "batch_size"):
        if facts[name] != getattr(settings, name):
            given = getattr(settings, name)
            raise ValueError(f"{path} was made with {name}={facts[name]}, not {given}: keep it or use another folder")
    module.load_state_dict(tree["model"])
    if facts.get("trained", _trained(module)) == _trained(module):  # else the parameters are others: AdamW begins anew
        common.restore_optimizer(optimizer, {int(k): v for k, v in tree.get("optimizer", {}).items()})
    return int(facts["step"])


def train_recognizer(
    data: Path, out: Path, work: Path, settings: Settings, resume: bool = True, reconstructions: Path | None = None
) -> int:
    """Trains on the dataset folder `data`; see `fit`."""
    task = RecognizerTask(Pictures.load(data, reconstructions), settings.batch_size, settings.seed)
    return fit(task, settings, out, work, resume)


def train_identity(
    data: Path,
    out: Path,
    work: Path,
    settings: Settings,
    resume: bool = True,
    reconstructions: Path | None = None,
    thaw: bool = False,
) -> int:
    """Trains on the folder `data` of `data.build_identity`, from the trunk of the recognizer beside `out`; see `fit`.

    thaw: learn that trunk too. A second round that goes on from a first one without (same `work`, more `steps`).
    """
    start = load_recognizer(out.parent / "recognizer")
    pictures = IdentityPictures.load(data, reconstructions)
    task = IdentityTask(
        pictures, settings.batch_size, settings.seed, IdentityConfig(trunk=start.config.trunk), start, thaw
    )
    return fit(task, settings, out, work, resume)


def train_clip(
    data: Path, out: Path, work: Path, settings: Settings, resume: bool = True, reconstructions: Path | None = None
) -> int:
    """Trains on the dataset folder `data` with the backbone's words; see `fit`."""
    pictures = Pictures.load(data, reconstructions)
    task = ClipTask(pictures, settings.batch_size, settings.seed, tokenizer.build())
    return fit(task, settings, out, work, resume)


TRAININGS: dict[str, tuple[Callable[..., int], Settings]] = {
    "recognizer": (train_recognizer, Settings(steps=12_000, batch_size=64, lr=1.5e-3)),
    "identity": (train_identity, Settings(steps=4000, lr=2e-3)),
    "clip": (train_clip, Settings(steps=4000, batch_size=128, lr=1e-3)),
}


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(TRAININGS))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reconstructions", type=Path)
    parser.add_argument("--fresh", action="store_true", help="ignore a checkpoint in --work")
    parser.add_argument("--thaw", action="store_true", help="identity: learn the recognizer's trunk too (second round)")
    for name, kind in (
        ("steps", int),
        ("batch_size", int),
        ("lr", float),
        ("seed", int),
        ("threads", int),
        ("minutes", float),
        ("device", str),
    ):
        parser.add_argument(f"--{name}", type=kind)
    given = vars(parser.parse_args())
    train, settings = TRAININGS[given["name"]]
    changed = {
        k: given[k]
        for k in ("steps", "batch_size", "lr", "seed", "threads", "minutes", "device")
        if given[k] is not None
    }
    settings = Settings(**{**vars(settings), **changed})
    out = given["out"] or WEIGHTS / given["name"]
    more = {"thaw": True} if given["thaw"] else {}
    train(given["data"], out, given["work"], settings, not given["fresh"], given["reconstructions"], **more)


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
