"""Measures how an iteration of score distillation spends its time, and how many views are rendered per second.

    python tests/bench/bench_asset_step.py [--recipe dreamfusion] [--steps 20] [--backbone PATH] [--side 64] [--set key=value]

Prints how the time of an iteration is split (render, encode, teacher, backward, optimizer, the rest) and the number of
rendered views per second of optimization. The run has a loaded concept, which consists of a learned word and a LoRA on
all attention layers. The weights of both are random, because their values do not affect the cost. The rate is given per
second of wall-clock time and per second of processor time. The latter is the rate of one core, even if other programs
share that core.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from bench_step import Clock

from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.modifiers.learnable import LearnableToken
from shared.recipe.resolve import load
from shared.runner.open_runner import open_runner
from shared.train.budget import Budget
from shared.train.frozen_layers import lean
from shared.train.last_good_state import LastGood
from shared.train.loop import Loop
from shared.train.memory import recomputed
from shared.train.optim import Optimizers
from shared.train.training_run import TrainingRun
from shared.trainable import Lora

SHOWN = ("render", "encode", "teacher", "backward", "optimizer", "rest")
NAME = "bench"


def settings_of(side: int) -> list[str]:
    """Returns the settings of a run that does not end, with views of this side length."""
    return [f"prompt=a photo of a <{NAME}>", f"train.resolution={side}", f"train.steps={10**6}"]


class Stepping:
    """A run just before the first step of its first phase, with a concept loaded. As a context, it keeps the contexts of
    that phase open."""

    def __init__(self, recipe: Recipe3D, runner: Runner3D, folder: Path) -> None:
        backbone = runner.backbone
        LearnableToken(vectors=2).attach(backbone, NAME, "robot", 0)
        part = Lora(roles=("cross_attention", "self_attention"), rank=8)
        for parameter in part.inject(backbone, NAME, "lora", 0).parameters:
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            parameter.requires_grad_(False).copy_(0.02 * drawn)
        self.run = TrainingRun(
            backbone, recipe, {}, folder / "run", folder / "cache", loaded_strengths=runner.strengths,
            tensorboard=False, tasks=Runner3D.tasks,
        )  # fmt: skip
        phase = self.run.phases[0][1]
        task: Any = self.run.tasks[type(phase.task)]
        self.task: Any = task(self.run.context(0, self.run._unfreeze(phase)))
        self.optimizers = Optimizers(self.task.groups(), phase.train.optimizers, self.run.accelerator)
        self.views = phase.train.batch_size * phase.train.gradient_accumulation
        self.loop = Loop(
            self.task, self.optimizers, Budget(steps=self.task.steps), phase.seed, self.run.accelerator,
            phase.train.gradient_accumulation, LastGood(self.optimizers), regroup=self.task.regrouped,
        )  # fmt: skip

    def __enter__(self) -> Stepping:
        run, how = self.run, self.task.recipe.train
        self.phase = ExitStack()
        self.phase.enter_context(lean((*run.backbone.components.values(), run.backbone.vae)))
        self.phase.enter_context(recomputed(run.backbone, how.gradient_checkpointing))
        self.phase.callback(run.offloaded.restore)
        run.offloaded.keep_only(self.task.networks_in_steps)
        return self

    def __exit__(self, *_: object) -> None:
        self.phase.close()

    def split(self, steps: int, now: Callable[[], float] = time.perf_counter) -> Clock:
        """Measures the seconds that each activity takes over `steps` steps of the loop, on the clock `now`."""
        clock = Clock(now)
        clock.seconds = dict.fromkeys(SHOWN, 0.0)
        for owner, method, name in (
            (self.task, "_drawn", "render"),
            (self.task.scores, "encode", "encode"),
            (self.task.scores, "eps", "teacher"),
            (self.optimizers, "backward", "backward"),
            (self.optimizers, "step", "optimizer"),
        ):
            clock.wrap(owner, method, name)
        with clock.of("rest"):
            self.steps(1000, steps)
        return clock

    def steps(self, first: int, count: int) -> float:
        """Takes `count` steps, starting with step `first`, and returns how many seconds they took."""
        self.loop.budget = Budget(steps=first + count)
        start = time.perf_counter()
        for _ in self.loop.run(first):
            pass
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="dreamfusion")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--backbone")
    parser.add_argument("--set", action="append", default=[], help="a recipe setting as key=value; can be repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        settings = settings_of(options.side) + ([f"backbone={options.backbone}"] if options.backbone else [])
        recipe = load(options.recipe, [*settings, *options.set], "3d", Recipe3D)
        runner = open_runner(Runner3D, options.backbone, [], **recipe.opening())
        with Stepping(recipe, runner, Path(temporary)) as stepping:
            stepping.steps(0, 3)  # a warm-up that encodes the texts and caches kernels
            turns = max(2, options.steps // 5)
            begun = time.process_time()
            rates = [5 * stepping.views / stepping.steps(10 + 5 * turn, 5) for turn in range(turns)]
            busy = (time.process_time() - begun) / (5 * turns * stepping.views)
            clock = stepping.split(options.steps)
    total = sum(clock.seconds.values())
    kind, side = stepping.task.recipe.field.kind, options.side
    print(
        f"{options.recipe}, {kind}, {stepping.views} views of {side}×{side}, {torch.get_num_threads()} threads; "
        "breakdown of an iteration:"
    )
    for name in SHOWN:
        print(f"  {name:13} {clock.seconds[name] / options.steps * 1e3:8.1f} ms  {clock.seconds[name] / total:6.1%}")
    print(f"rendered views per second of optimization: {statistics.median(rates):.2f}")
    print(f"  per second of processor time: {1 / busy:.2f}")


if __name__ == "__main__":
    main()
