"""Runs a pretraining task with the training loop of `shared.train`. A run has a budget and a log, saves a checkpoint
every few minutes, and can be interrupted and resumed."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from shared.pretrain.task import Compute, PretrainTask
from shared.train import checkpoint
from shared.train.budget import Budget
from shared.train.device import pick_device
from shared.train.log import Log, check_log, flat
from shared.train.loop import Loop, Record
from shared.train.optim import NotFinite, Optimizers
from shared.train.precision import resolve_precision
from shared.train.signals import interruptible

_SKIPPED = 20  # the run stops after this many consecutive steps without a finite gradient


@dataclass(frozen=True)
class RunSettings:
    """The budget and device of a training run.

    The budget is either `steps`, counted from the beginning of the run, or `minutes`, counted from the call to
    `run_task`. Learning rates depend on the fraction of the budget spent so far. If both are set, `steps` is the
    budget, and the time limit only pauses the run.
    """

    steps: int | None = None
    minutes: float | None = None
    pause_at: int | None = None  # the step after which the run pauses; it does not affect the learning rates
    resume: bool = True  # whether to resume from the newest checkpoint, if there is one
    threads: int | None = None  # the number of threads that torch uses on a CPU
    device: str | None = None  # a torch device; by default, the GPU if there is one
    bf16: bool | None = None  # by default, bf16 is used only where it is fast; elsewhere, it can take ten times as long
    compiled: bool = False  # whether to compile U-Net blocks, which takes a minute but doubles the speed on a GPU
    log_every: int = 50  # steps between log lines
    save_minutes: float = 3.0

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("a training run needs a limit: set steps, minutes or both")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")

    def budget(self) -> Budget:
        """Returns the budget, starting now."""
        return Budget(steps=self.steps) if self.steps is not None else Budget(minutes=self.minutes)

    def compute(self) -> Compute:
        """Chooses the device and sets torch's number of CPU threads. With more threads than cores, training is ten
        times slower."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        device = pick_device(self.device)
        bf16 = resolve_precision("auto", device) == "bf16" if self.bf16 is None else self.bf16
        return Compute(device, bf16, self.compiled)


@dataclass(frozen=True)
class Outcome:
    """The progress of a run when `run_task` returns."""

    step: int  # total number of steps done
    pictures: int  # total number of pictures seen
    taken: int  # number of steps done in this call
    losses: Mapping[str, float]  # the parts of the last step's loss


def run_task(
    task: PretrainTask, settings: RunSettings, folder: Path, first: int = 0, budget: Budget | None = None
) -> Outcome:
    """Trains until the budget is spent, then calls the task's `result`.

    Args:
        folder: the folder to which checkpoints and `log.jsonl` are written
        first: the step at which a run without a checkpoint begins. This is 0, or the step of the weights from which the
            run continues.
        budget: the budget, for tasks that use the budget themselves. If None, a new budget starts now.

    Raises:
        ValueError: if the checkpoint was made with different settings
        NotFinite: if gradients or parameters are no longer finite; the last good state is saved
        KeyboardInterrupt: if the run was interrupted; the state is saved
    """
    return _Session(task, settings, folder, first).run(budget or settings.budget())


class _Session:
    """The part of a run from its start or resumption to the next pause."""

    def __init__(self, task: PretrainTask, settings: RunSettings, folder: Path, first: int) -> None:
        self.task, self.settings, self.folder = task, settings, folder
        check_log(folder)
        state = checkpoint.load(folder) if settings.resume else None
        self.start = self.step = state.step if state else first
        self.pictures = int(state.info["pictures"]) if state else first * task.batch_size
        if state is not None:
            _check_same(folder, state.info["facts"], task.facts)
            task.load_state_dict(state.learned)
        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise, the device of an earlier run would be kept
        self.accelerator = Accelerator(mixed_precision="no", cpu=task.compute.device.type == "cpu")
        self.optimizers = Optimizers(task.groups(), task.optimizers, self.accelerator)
        self.trained = {name: len(self.optimizers.parameters([name])) for name in self.optimizers.names}
        if state is not None and state.optimizer:  # adopted weights have no optimizer state
            self._restore_optimizer(state)
        self.log = Log(folder, self.start, tensorboard=False)
        self.window = _Window()
        self.begun = self.saved = time.monotonic()

    def _restore_optimizer(self, state: checkpoint.State) -> None:
        if state.info.get("trained") != self.trained:
            warnings.warn(
                f"{self.folder}: when the checkpoint was made, other parameters were being trained, so the optimizer "
                "starts afresh",
                stacklevel=2,
            )
            return
        self.optimizers.load_state_dict(state.optimizer)
        self.optimizers.load_progress(state.info.get("progress", {}))

    def run(self, budget: Budget) -> Outcome:
        record: Record | None = None
        try:
            with interruptible() as stop:
                for record in self._records(budget):
                    self._after(record)
                    if stop.is_set() or self._paused():
                        break
                self._write_window()
                if self.step > self.start:
                    self._save()
                if stop.is_set():
                    raise KeyboardInterrupt
            measured = self.task.result()
            if measured:
                self._write(measured)
        finally:
            self.log.close()
        return Outcome(self.step, self.pictures, self.step - self.start, dict(record.parts) if record else {})

    def _records(self, budget: Budget) -> Iterator[Record]:
        """Yields the loop's steps. A step with a non-finite loss or gradient is skipped with a warning."""
        task = self.task
        loop = Loop(task, self.optimizers, budget, task.seed, self.accelerator, averages=task.averages)
        step, skipped = self.start, 0
        while True:
            try:
                for record in loop.run(step):
                    step, skipped = record.step, 0
                    yield record
                return
            except NotFinite as error:
                step, skipped = step + 1, skipped + 1
                if skipped == _SKIPPED:
                    self._save()
                    raise NotFinite(
                        f"{error}, like those of the {skipped - 1} steps before. The state at step {self.step} is "
                        f"saved in {self.folder}; resume with a lower learning rate, or without bf16"
                    ) from None
                warnings.warn(f"{error}: the step is skipped", stacklevel=2)

    def _after(self, record: Record) -> None:
        self.step, self.pictures = record.step, self.pictures + self.task.batch_size
        self.window.add(record)
        if record.step % self.settings.log_every == 0:
            self._write_window()
        self.task.after_step(self.step, self.pictures)
        if time.monotonic() - self.saved > 60 * self.settings.save_minutes:
            self._save()

    def _paused(self) -> bool:
        settings = self.settings
        over = settings.minutes is not None and time.monotonic() - self.begun > 60 * settings.minutes
        return over or (settings.pause_at is not None and self.step >= settings.pause_at)

    def _write_window(self) -> None:
        if self.window.records:
            self._write({**self.window.mean(), **self.window.speed(self.task.batch_size), "pictures": self.pictures})
        self.window = _Window()

    def _write(self, values: Mapping[str, float]) -> None:
        short = {name: value if isinstance(value, int) else float(f"{value:.5g}") for name, value in values.items()}
        self.log.scalars(self.step, short)
        print(f"{self.folder.name}: step {self.step}  " + "  ".join(f"{k} {v}" for k, v in short.items()), flush=True)

    def _save(self) -> None:
        """Saves a checkpoint. If parameters are not finite, raises NotFinite and keeps the previous checkpoint."""
        self.optimizers.check_finite(self.step)
        info = checkpoint_info(self.task.facts, self.pictures)
        info |= {"trained": self.trained, "progress": self.optimizers.progress()}
        checkpoint.save(
            self.folder,
            checkpoint.State(0, self.step, self.task.state_dict(), self.optimizers.state_dict(), info=info),
        )
        self.saved = time.monotonic()


@dataclass
class _Window:
    """The steps since the last log line."""

    records: list[Record] = field(default_factory=list)
    since: float = field(default_factory=time.monotonic)

    def add(self, record: Record) -> None:
        self.records.append(record)

    def mean(self) -> dict[str, float]:
        """Returns the last value of each learning rate, and the mean of every other logged value over these steps."""
        rows = [flat(record) for record in self.records]
        return {
            key: rows[-1][key] if key.startswith("lr/") else sum(row[key] for row in rows if key in row) / len(rows)
            for key in rows[-1]
        }

    def speed(self, batch_size: int) -> dict[str, float]:
        return {"pictures_per_s": len(self.records) * batch_size / (time.monotonic() - self.since)}


def checkpoint_info(facts: Mapping[str, Any], pictures: int) -> dict[str, Any]:
    """Returns the metadata that a checkpoint stores in addition to its tensors and step."""
    return {"facts": json.loads(json.dumps(dict(facts))), "pictures": pictures}


def refuse_older(file: Path) -> None:
    """Raises ValueError if `file` exists. A file at this path is a checkpoint from an earlier version, which cannot be
    read."""
    if file.is_file():
        raise ValueError(
            f"{file} is a checkpoint from an earlier version and cannot be resumed; remove it, or use another folder"
        )


def _check_same(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    given = json.loads(json.dumps(dict(now)))
    for name in sorted(saved.keys() & given.keys()):
        if saved[name] != given[name]:
            raise ValueError(
                f"{folder} was made with {name}={saved[name]}, not {given[name]}; use the same value, or another folder"
            )
