"""Measures how a training step spends its time and how much faster caches make it.

    python tests/bench/bench_step.py [--recipe dreambooth_lora] [--steps 40] [--backbone PATH]

Prints how a step's time is split (data, autoencoder, text encoder, denoiser forward, backward, optimizer) and the
steps per second of the suite and of a plain loop without caches. The two loops take turns, so drift in machine speed
favours neither.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pcs_image.runner import ImageRunner
from shared.backbones import load_backbone
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.toybox.reference_sets import write_album
from shared.train.optim import Optimizers
from shared.train.training_run import TrainingRun
from shared.train.tune import Tune

SHOWN = ("data", "autoencoder", "text encoder", "denoiser", "backward", "optimizer")


class Clock:
    """Measures the seconds spent in named blocks. Time in a nested block counts only for that block."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.seconds = dict.fromkeys(SHOWN, 0.0)
        self.inner = 0.0

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        outer, self.inner, start = self.inner, 0.0, self.now()
        try:
            yield
        finally:
            spent = self.now() - start
            self.seconds[name] += spent - self.inner
            self.inner = outer + spent

    def wrap(self, owner: Any, method: str, name: str) -> None:
        plain: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(name):
                return plain(*args, **kwargs)

        setattr(owner, method, timed)


def prepare(recipe: str, backbone: str | None, folder: Path, cache: bool) -> tuple[TrainingRun, Tune, Optimizers]:
    """Returns a run, its task and its optimizers, ready for the first step of the last phase."""
    settings = [f"subject.images={folder}", "subject.class_noun=duck", f"train.cache={str(cache).lower()}"]
    settings += [f"backbone={backbone}"] if backbone else []
    resolved = load(
        recipe, [*settings, "sources.class_pictures.num_images=16"] if recipe == "dreambooth_lora" else settings
    )
    model = load_backbone(backbone)
    subject = read_subject(folder, "duck")
    session = TrainingRun(
        model, resolved, {"bench": subject}, folder / "work", folder / "cache",
        class_pictures=ImageRunner(model)._class_pictures, tensorboard=False,
    )  # fmt: skip
    session._attach_names()
    last = len(session.phases) - 1
    task = Tune(session.context(last, session._unfreeze(session.phases[last][1])))
    return session, task, Optimizers(task.groups(), task.recipe.train.optimizers, session.accelerator)


def step(session: TrainingRun, task: Tune, optimizers: Optimizers, index: int, clock: Clock | None = None) -> None:
    quiet = clock or Clock()
    with session.accelerator.autocast():
        updates = task.updates(index, 0)
        update = next(updates)
    with quiet.of("backward"):
        session.accelerator.backward(update.loss)
    updates.close()
    with quiet.of("optimizer"):
        optimizers.step("main", session.accelerator, index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="dreambooth_lora")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--backbone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photos"
        write_album("development-duck", folder)
        cached = prepare(options.recipe, options.backbone, folder, cache=True)
        plain = prepare(options.recipe, options.backbone, folder, cache=False)
        rates: dict[str, list[float]] = {"suite": [], "plain": []}
        for index in range(3):  # a warm-up that fills the caches
            step(*cached, index)
            step(*plain, index)
        rounds = max(2, options.steps // 10)
        for turn in range(rounds):
            for name, run in (("suite", cached), ("plain", plain)):
                start = time.perf_counter()
                for index in range(5):
                    step(*run, 3 + turn * 5 + index)
                rates[name].append(5 / (time.perf_counter() - start))
        clock = Clock()
        session, task, optimizers = cached
        clock.wrap(task.data, "batch", "data")
        clock.wrap(task.backbone, "latent_moments", "autoencoder")
        clock.wrap(task, "encode", "text encoder")
        clock.wrap(task.backbone, "predict", "denoiser")
        for index in range(options.steps):
            step(session, task, optimizers, 100 + index, clock)
    total = sum(clock.seconds.values())
    print(
        f"{options.recipe}, batch {task.recipe.train.batch_size}, {torch.get_num_threads()} threads; breakdown of a step:"
    )
    for name in SHOWN:
        print(f"  {name:13} {clock.seconds[name] / options.steps * 1e3:8.1f} ms  {clock.seconds[name] / total:6.1%}")
    ratio = statistics.median(a / b for a, b in zip(rates["suite"], rates["plain"], strict=True))
    print(f"steps per second: {statistics.median(rates['suite']):.2f}")
    print(
        f"  a plain loop without caches: {statistics.median(rates['plain']):.2f}; the suite is {ratio:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
