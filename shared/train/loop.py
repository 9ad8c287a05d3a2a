"""The training loop, a generator of steps. Logging, saving and sampling are left to the caller.

Every random draw in step i comes from a generator seeded with (seed, i). Therefore no generator state has to be saved,
and a run that is stopped after k steps and resumed for m more gives the same result as a single run of k + m steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from shared.train.averages import Averages
from shared.train.budget import Budget
from shared.train.last_good_state import LastGood
from shared.train.optim import NotFinite, Optimizers
from shared.train.task import Regrouped, Update, Updates, UpdateSource

if TYPE_CHECKING:
    from accelerate import Accelerator

#: Returns the parameters that are trained from a given step onwards, or None if they do not change.
Regroup = Callable[[int], Regrouped | None]


@dataclass(frozen=True)
class Record:
    """The outcome of one step."""

    step: int  # the number of steps done, including this one
    loss: float | None  # None if the step has no loss, for example because it generates pictures
    parts: Mapping[str, float]
    lr: Mapping[str, float]
    grad_norm: float


def generator(seed: int, step: int, micro: int = 0) -> torch.Generator:
    """Returns the CPU generator for one micro-batch. In practice, the streams of different steps do not overlap."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + micro * 0x94D049BB133111EB + 1) % 2**63
    return torch.Generator().manual_seed(mixed)


@dataclass
class Loop:
    """Runs a task's steps.

    Args:
        good: keeps the state to roll back to when a loss or a gradient is not finite
        averages: moving averages of the trained parameters, updated after each step
        regroup: called before each step. If it changes what is trained, parameters that are still trained keep their
            moments, and `good` starts over
    """

    task: UpdateSource
    optimizers: Optimizers
    budget: Budget
    seed: int
    accelerator: Accelerator
    gradient_accumulation: int = 1
    good: LastGood | None = None
    averages: Averages | None = None
    regroup: Regroup | None = None

    def run(self, start: int = 0) -> Iterator[Record]:
        """Yields a `Record` after each step, from `start` until the budget is spent.

        Raises NotFinite when a loss or a gradient is not finite, without applying the update. `good` then contains the
        state to roll back to.
        """
        step = start
        while not self.budget.over(step):
            yield self._step(step)
            step += 1

    def _step(self, step: int) -> Record:
        done = _Sums(self.gradient_accumulation)
        regrouped = self.regroup(step) if self.regroup else None
        if regrouped is not None:
            self.optimizers.regroup(regrouped.groups, self.accelerator, regrouped.came_from)
            if self.good:
                self.good.forget()
        self.optimizers.set_step(step, self.budget)
        for micro in range(self.gradient_accumulation):
            self._seed(step, micro)
            updates = self.task.updates(step, micro)
            try:
                while (update := self._next(updates)) is not None:
                    self._backward(update, step, done)
                    if micro == self.gradient_accumulation - 1:
                        self._apply(update, step, done)
            finally:
                updates.close()
        if done.kept and self.averages is not None:
            self.averages.update(step)
        return Record(step + 1, done.loss, done.parts, self.optimizers.rates(), done.norm)

    def _seed(self, step: int, micro: int) -> None:
        torch.manual_seed(generator(self.seed, step, micro).initial_seed() % 2**31)  # dropout uses the global generator

    def _next(self, updates: Updates) -> Update | None:
        with self.accelerator.autocast():
            return next(updates, None)

    def _backward(self, update: Update, step: int, done: _Sums) -> None:
        value = float(update.loss.detach())
        if not math.isfinite(value):
            self.optimizers.zero_grad()
            raise NotFinite(f"the loss at step {step + 1} is {value}")
        self.optimizers.backward(update.loss / self.gradient_accumulation, update.groups, self.accelerator)
        done.add(value, update)

    def _apply(self, update: Update, step: int, done: _Sums) -> None:
        loss = done.loss
        assert loss is not None
        for group in update.groups if update.groups is not None else self.optimizers.names:
            before = partial(self.good.keep, step, loss) if self.good and not done.kept else None
            closure = partial(self._again, group, step) if self.optimizers.needs_closure(group) else None
            done.norm, done.kept = self.optimizers.step(group, self.accelerator, step, before, closure), True

    def _again(self, group: str, step: int) -> torch.Tensor:
        """Recomputes one optimizer group's loss and gradients with the same noise. Keeps all other gradients."""
        self.optimizers.zero_grad(group)
        total = torch.zeros(())
        for micro in range(self.gradient_accumulation):
            self._seed(step, micro)
            updates = self.task.updates(step, micro)
            while (update := self._next(updates)) is not None:
                if update.groups is None or group in update.groups:
                    part = update.loss / self.gradient_accumulation
                    self.optimizers.backward(part, (group,), self.accelerator)
                    total = total + part.detach().cpu()
        return total


class _Sums:
    """A step's totals over its micro-batches."""

    def __init__(self, micro_batches: int) -> None:
        self.micro_batches = micro_batches
        self.losses: list[float] = []
        self.parts: dict[str, float] = {}
        self.norm, self.kept = 0.0, False

    def add(self, value: float, update: Update) -> None:
        self.losses.append(value)
        for key, part in update.parts.items():
            self.parts[key] = self.parts.get(key, 0.0) + float(part) / self.micro_batches

    @property
    def loss(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None
