"""Runs one phase: the steps of its task, and the work between the steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from shared.recipe.schema import Recipe
from shared.train import checkpoint
from shared.train.budget import Budget
from shared.train.frozen_layers import lean
from shared.train.last_good_state import LastGood
from shared.train.learned_state import adapters_in, gather
from shared.train.log import Log, flat
from shared.train.loop import Loop, Record
from shared.train.memory import bring_trained, recomputed
from shared.train.optim import NotFinite, Optimizers
from shared.train.signals import interruptible
from shared.train.task import Task
from shared.trainable import TrainableGroup

if TYPE_CHECKING:
    from shared.train.training_run import TrainingRun


class Interrupted(KeyboardInterrupt):
    """Raised after Ctrl-C, SIGTERM or SIGHUP, once the state has been saved."""


class Phase:
    """One phase of a run, from its task's first step to its result."""

    def __init__(self, run: TrainingRun, index: int, name: str, recipe: Recipe, log: Log) -> None:
        self.owner, self.index, self.name, self.recipe, self.log = run, index, name, recipe, log
        self.offset = run.steps_before(index)
        self.start = self.step = 0
        self.task: Task
        self.optimizers: Optimizers
        self.good: LastGood

    def run(self, trained: list[TrainableGroup], restored: checkpoint.State | None) -> Iterator[Record]:
        owner = self.owner
        self.start = self.step = restored.step if restored else 0
        self.task = owner.tasks[type(self.recipe.task)](owner.context(self.index, trained, self.start))
        if restored is not None:
            self.task.load_state_dict(restored.learned)
        groups = self.task.groups()
        bring_trained(owner.backbone)
        self.optimizers = Optimizers(groups, self.recipe.train.optimizers, owner.accelerator)
        if restored is not None:
            self.optimizers.load_state_dict(restored.optimizer)
            self.optimizers.load_scaler_state(restored.info.get("scaler", {}))
            self.optimizers.load_progress(restored.info.get("progress", {}))
        self.good = LastGood(self.optimizers)
        if not self.start:
            owner.final_scores = {}
        with ExitStack() as stack:
            stop = stack.enter_context(interruptible())
            self._enter(stack)
            try:
                owner.begin()
                for record in self._loop().run(self.start):
                    self.step = record.step
                    self.log.scalars(self.offset + self.step, flat(record))
                    self._after()
                    yield record
                    if stop.is_set():
                        self._save()
                        raise Interrupted
                self.optimizers.check_finite(self.step)
            except NotFinite as error:
                raise NotFinite(f"{error} (phase {self.name}); {self._keep_good()}") from None
            self._finish()
            if stop.is_set():  # the signal came after the last step
                raise Interrupted

    def _enter(self, stack: ExitStack) -> None:
        """Enters the contexts that stay open while the phase runs."""
        owner, backbone = self.owner, self.owner.backbone
        off = dict.fromkeys((name for name in self.recipe.task.off if name in backbone.adapters), 0.0)
        if off:
            stack.enter_context(backbone.active({**backbone.strengths, **off}))
        stack.enter_context(lean((*backbone.components.values(), backbone.vae)))
        stack.enter_context(recomputed(backbone, self.recipe.train.gradient_checkpointing))
        stack.callback(self._dropout, False)
        stack.callback(owner.offloaded.restore)
        self._dropout(True)
        if owner.offloaded.on:  # on a GPU, offload the networks that the steps do not use
            owner.offloaded.keep_only(self.task.networks_in_steps)

    def _loop(self) -> Loop:
        recipe, owner = self.recipe, self.owner
        return Loop(
            self.task,
            self.optimizers,
            Budget(steps=self.task.steps),
            recipe.seed,
            owner.accelerator,
            recipe.train.gradient_accumulation,
            self.good,
            regroup=self.task.regrouped,
        )

    def _after(self) -> None:
        """Does the work that is due after a step: validates, keeps the best state, and writes a checkpoint."""
        owner, check, step, last = self.owner, self.recipe.train.validation, self.step, self.task.steps
        if owner.preview and check.every and (step % check.every == 0 or step == last) and self.optimizers.names:
            self.optimizers.check_finite(step)
            self._validate()
        every = self.recipe.train.checkpoint_every
        if every and step % every == 0 and step < last:
            self.optimizers.check_finite(step)
            self._save()

    def _validate(self) -> None:
        owner, check, step = self.owner, self.recipe.train.validation, self.step
        assert owner.preview is not None
        self._dropout(False)
        self.optimizers.average(True)
        with owner.clock.on("validation"), owner.offloaded.on_device(), owner.accelerator.autocast():
            pixels, scores = owner.preview(self.name, step)
        self.log.scalars(self.offset + step, {f"validation/{k}": v for k, v in scores.items()})
        self.log.samples(self.offset + step, pixels)
        score = scores.get("score")
        if not check.keep_best or score is None:
            owner.final_scores = dict(scores)
        if check.keep_best and score is not None and (owner.best_score is None or score > owner.best_score):
            owner.best, owner.best_score = self.task.state_dict(), score
            owner.final_scores = {**scores, "step": step}
        self.optimizers.average(False)
        self._dropout(True)

    def _keep_good(self) -> str:
        """Saves the state from before the update that led to a non-finite loss. Returns advice for the user."""
        owner = self.owner
        before = self.good.put_back()
        if before is not None or (self.step == self.start and checkpoint.load(owner.workdir) is None):
            self.step = before if before is not None else self.start
            self._save(not_finite=True)
        elif (newest := checkpoint.load(owner.workdir)) is not None:
            self.step = newest.step
            checkpoint.amend(owner.workdir, not_finite=True)
        else:
            return f"there is no earlier state to return to. Lower the learning rate ({self.task.rate_key}) and start over."
        return (
            f"the last good state, from step {self.step}, is kept in {owner.workdir}. Lower the learning rate "
            f"({self.task.rate_key}) or set train.mixed_precision=no, then continue with --resume."
        )

    def _finish(self) -> None:
        """Ends the phase. If its best state was kept, restores it, so that the next phase starts from it."""
        owner = self.owner
        self.optimizers.average(True)
        if owner.best:
            self.task.load_state_dict(owner.best)
        owner.best, owner.best_score = {}, None
        self.task.result()
        carried = self.task.carried()
        anew = {key.split("/")[0] for key in carried}
        owner.carried = {k: v for k, v in owner.carried.items() if k.split("/")[0] not in anew} | carried
        owner.save(checkpoint.State(self.index + 1, 0, self._learned()), {})

    def _learned(self) -> dict[str, Tensor]:
        owner = self.owner
        return gather(owner.backbone, owner.names, owner.sets_of_the_run)

    def _save(self, not_finite: bool = False) -> None:
        info = {"progress": self.optimizers.progress()}
        state = checkpoint.State(self.index, self.step, self.task.state_dict(), self.optimizers.state_dict(), info=info)
        self.owner.save(state, self.optimizers.scaler_state(), not_finite)

    def _dropout(self, on: bool) -> None:
        for adapter in adapters_in(self.owner.backbone, self.owner.sets_of_the_run):
            adapter.train(on)
