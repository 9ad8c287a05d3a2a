"""Measures how a training step on clips spends its time and how much faster caches make it.

    python tests/bench/bench_clip_step.py [--recipe motion_director] [--steps 20] [--backbone PATH] [--frames 16] [--set K=V]

Prints how a step's time is split (data, autoencoder, text encoder, denoiser forward, backward, optimizer), the
steps per second of the suite and of a plain loop without caches, the time that all steps of the recipe would take, and
the peak memory of both loops. The two loops take turns, so drift in machine speed favours neither. Each memory peak
is measured in a separate process. On a GPU, it counts only tensors. On a CPU, all times are CPU times of the process,
so other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_step import SHOWN, Clock

from pcs_video.recipe import VideoRecipe
from pcs_video.runner import VideoRunner
from shared.recipe.resolve import load
from shared.runner.open_runner import open_runner
from shared.runner.plan import plan
from shared.toybox.motions.reference_clips import write_motion
from shared.train.costs import peak_memory
from shared.train.optim import Optimizers
from shared.train.training_run import TrainingRun

MOTION = "development-zigzag"


def clock_of(stepping: Stepping) -> Callable[[], float]:
    """Returns a clock that reads the CPU time of the process or, on a GPU, wall-clock time."""
    if stepping.run.backbone.device.type == "cpu":
        return time.process_time

    def finished() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return finished


class Stepping:
    """A run just before the first step of its first phase."""

    def __init__(self, options: argparse.Namespace, folder: Path, cache: bool) -> None:
        work = folder / ("suite" if cache else "plain")
        settings = [f"subject.clips={folder / 'clips'}", f"output={work / 'x.concept'}", f"train.cache={cache}".lower()]
        settings += [f"backbone={options.backbone}"] if options.backbone else []
        settings += [f"sources.clips.window.length={options.frames}", *options.set]
        planned = plan(load(options.recipe, settings, "video", VideoRecipe))
        runner = open_runner(VideoRunner, options.backbone, [], **planned.recipe.opening())
        self.run = TrainingRun(
            runner.backbone, planned.recipe, planned.subjects, work / "run", work / "cache", tensorboard=False,
            class_pictures=runner._class_pictures, tasks=VideoRunner.tasks,
        )  # fmt: skip
        self.run._attach_names()
        self.recipe = recipe = self.run.phases[0][1]
        task: Any = self.run.tasks[type(recipe.task)]
        self.task: Any = task(self.run.context(0, self.run._unfreeze(recipe)))
        self.optimizers = Optimizers(self.task.groups(), recipe.train.optimizers, self.run.accelerator)

    def step(self, index: int, clock: Clock | None = None) -> None:
        """Runs all updates of one step, each with its loss, gradients and optimizers."""
        quiet, accelerator = clock or Clock(), self.run.accelerator
        updates = self.task.updates(index, 0)
        while True:
            with accelerator.autocast():
                update = next(updates, None)
            if update is None:
                return
            with quiet.of("backward"):
                self.optimizers.backward(update.loss, update.groups, accelerator)
            with quiet.of("optimizer"):
                for group in update.groups or self.optimizers.names:
                    self.optimizers.step(group, accelerator, index)


def memory(options: argparse.Namespace, folder: Path, name: str) -> int:
    """Takes two steps in a separate process and returns the peak memory of that process, in bytes."""
    command = [sys.executable, __file__, "--memory", name, "--folder", str(folder), "--recipe", options.recipe]
    command += ["--frames", str(options.frames), *(["--backbone", options.backbone] if options.backbone else [])]
    command += [word for setting in options.set for word in ("--set", setting)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def speeds(suite: Stepping, plain: Stepping, steps: int) -> dict[str, list[float]]:
    """Measures the steps per second of both loops, letting them take turns."""
    rates: dict[str, list[float]] = {"suite": [], "plain": []}
    now = clock_of(suite)
    for index in range(2):  # a warm-up that fills the caches
        suite.step(index)
        plain.step(index)
    at_once = min(4, steps)
    for turn in range(max(2, steps // 8)):
        for name, one in (("suite", suite), ("plain", plain)):
            start = now()
            for index in range(at_once):
                one.step(2 + turn * at_once + index)
            rates[name].append(at_once / (now() - start))
    return rates


def split(stepping: Stepping, steps: int) -> Clock:
    clock = Clock(clock_of(stepping))
    for owner, method, name in (
        (stepping.task.data, "batch", "data"),
        (stepping.task.backbone, "latent_moments", "autoencoder"),
        (stepping.task, "encode", "text encoder"),
        (stepping.task.backbone, "predict", "denoiser"),
    ):
        clock.wrap(owner, method, name)
    for index in range(steps):
        stepping.step(1000 + index, clock)
    return clock


def report(options: argparse.Namespace, folder: Path) -> None:
    suite, plain = Stepping(options, folder, True), Stepping(options, folder, False)
    rates = speeds(suite, plain, options.steps)
    clock = split(suite, options.steps)
    total = sum(clock.seconds.values())
    print(f"{options.recipe}, {options.frames} frames, {torch.get_num_threads()} threads; breakdown of a step:")
    for name in SHOWN:
        print(f"  {name:13} {clock.seconds[name] / options.steps * 1e3:8.1f} ms  {clock.seconds[name] / total:6.1%}")
    ratio = statistics.median(a / b for a, b in zip(rates["suite"], rates["plain"], strict=True))
    rate, all_steps = statistics.median(rates["suite"]), suite.recipe.train.steps
    second = "CPU second" if suite.run.backbone.device.type == "cpu" else "second"
    print(f"steps per {second}: {rate:.2f}; all {all_steps} steps of the recipe: {all_steps / rate / 60:.1f} minutes")
    print(
        f"  a plain loop without caches: {statistics.median(rates['plain']):.2f}; the suite is {ratio:.2f} times as fast"
    )
    ours, theirs = (memory(options, folder, name) for name in ("suite", "plain"))
    print(f"peak memory: {ours / 2**20:.0f} MB; without caches, {theirs / 2**20:.0f} MB (ratio {ours / theirs:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="motion_director")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--backbone")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe setting; can be repeated"
    )
    parser.add_argument("--memory", choices=("suite", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        stepping = Stepping(options, options.folder, options.memory == "suite")
        for index in range(2):
            stepping.step(index)
        print(peak_memory(stepping.run.backbone.device)[0])
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_motion(MOTION, folder / "clips", n=2, frames=options.frames)
        report(options, folder)


if __name__ == "__main__":
    main()
