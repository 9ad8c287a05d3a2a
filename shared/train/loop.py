"""The training loop: a generator of steps. Logging, saving, pictures and pages stay outside it.

Every random draw of step i comes from a generator seeded with (seed, i): no generator state has to be saved, and k + m steps
equal k steps, stop, resume, m steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from shared.recipe.schema import Train
from shared.train.last_good_state import LastGood
from shared.train.optim import NotFinite, Optimizers


@dataclass(frozen=True)
class Update:
    """One loss for one group of parameters. A step may hold several, in order (distillation alternates)."""

    loss: Tensor  # scalar
    group: str = "main"
    parts: Mapping[str, float | Tensor] = field(default_factory=dict)  # what the loss is made of, for the log


@dataclass(frozen=True)
class Record:
    """What one optimizer step did."""

    step: int  # steps done, this one included
    loss: float
    parts: Mapping[str, float]
    lr: Mapping[str, float]
    grad_norm: float


class Task(Protocol):
    """Something trainable. It knows its data and its losses; the loop knows time, gradients and optimizers."""

    def updates(self, step: int, micro: int) -> Iterator[Update]:
        """The losses of one micro-batch. Anything random derives from `generator(seed, step, micro)`."""
        ...


def generator(seed: int, step: int, micro: int = 0) -> torch.Generator:
    """The CPU generator of one micro-batch; streams of different steps do not overlap in practice."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


def run(
    task: Task,
    optimizers: Optimizers,
    settings: Train,
    seed: int,
    accelerator: Accelerator,
    start: int = 0,
    good: LastGood | None = None,
) -> Iterator[Record]:
    """Yield a `Record` after each optimizer step, from `start` to `settings.steps`.

    Raises NotFinite before parameters are touched by a bad gradient; `good` then holds the state to go back to.
    """
    for step in range(start, settings.steps):
        losses: list[float] = []
        parts: dict[str, float] = {}
        norm, kept = 0.0, False
        optimizers.set_step(step, settings.steps)
        for micro in range(settings.gradient_accumulation):
            torch.manual_seed(generator(seed, step, micro).initial_seed() % 2**31)  # dropout draws from the global one
            updates = task.updates(step, micro)
            while True:
                with accelerator.autocast():
                    update = next(updates, None)
                if update is None:
                    break
                value = float(update.loss.detach())
                if not math.isfinite(value):
                    optimizers.zero_grad()
                    raise NotFinite(f"the loss of step {step + 1} is {value}")
                optimizers.backward(update.loss / settings.gradient_accumulation, update.group, accelerator)
                losses.append(value)
                for key, part in update.parts.items():
                    parts[key] = parts.get(key, 0.0) + float(part) / settings.gradient_accumulation
                if micro == settings.gradient_accumulation - 1:
                    loss = sum(losses) / len(losses)
                    before = partial(good.keep, step, loss) if good and not kept else None
                    norm, kept = optimizers.step(update.group, accelerator, step, before), True
        yield Record(step + 1, sum(losses) / len(losses), parts, optimizers.rates(), norm)
