"""One run from pictures to learned tensors: phases, checkpoints, pictures while training, the best state, interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from shared.backbones.attention import pays
from shared.backbones.protocol import Backbone
from shared.concept.confusable import confusable
from shared.recipe.resolve import dump, expand_phases
from shared.recipe.schema import Recipe
from shared.recipe.tasks import GenerateTask, TuneTask
from shared.sources.base import Generate as ClassPictures
from shared.sources.base import SourceContext
from shared.train import checkpoint
from shared.train.budget import Budget
from shared.train.context import MakeNow, PhaseContext, Score, TaskTable
from shared.train.costs import Clock, summary, watch_memory
from shared.train.generate import Generate
from shared.train.last_good_state import LastGood
from shared.train.learned_state import gather, restore
from shared.train.log import Log, flat
from shared.train.loop import Loop, Record
from shared.train.memory import Offloaded, bring_trained, recomputed
from shared.train.optim import NotFinite, Optimizers
from shared.train.precision import resolve_precision
from shared.train.preflight import check_phases, check_validation
from shared.train.resuming import WEIGHTS, dependencies, model_key, same_dependencies, same_precision, same_recipe
from shared.train.signals import interruptible
from shared.train.task import Task
from shared.train.tune import Tune
from shared.trainable import TrainableGroup
from shared.types import Example, Subject

#: The tasks of the core; a package adds its own.
TASKS: TaskTable = {TuneTask: Tune, GenerateTask: Generate}


class Preview(Protocol):
    """Pictures of the state in training, and their scores ("score": the higher the better)."""

    def __call__(self, phase: str, step: int) -> tuple[Tensor, Mapping[str, float]]: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, SIGTERM or SIGHUP, after the state was saved."""


@dataclass
class TrainingRun:
    """Runs a recipe's phases on `backbone` for `subjects`.

    Concepts attached before stay on at `loaded_strengths`; what is learned is attached under the subjects' names (tokens)
    and `run_name` (adapters) and stays there afterwards.
    """

    backbone: Backbone
    recipe: Recipe
    subjects: Mapping[str, Subject]
    workdir: Path
    cache_dir: Path
    class_pictures: ClassPictures | None = None  # pictures of the model without what is in training
    make: MakeNow | None = None  # pictures of the model as it is now
    preview: Preview | None = None
    scorers: Mapping[str, Score] = field(default_factory=dict)
    loaded_strengths: Mapping[str, float] = field(default_factory=dict)
    tensorboard: bool = True
    on_pictures: Callable[[str, int, int], None] | None = None  # (what, done, of) while pictures are made
    tasks: TaskTable = field(default_factory=lambda: TASKS)

    def __post_init__(self) -> None:
        self.names = list(self.subjects)
        self.run_name = "+".join(self.names)
        self.class_nouns = {n: s.class_noun for n, s in self.subjects.items()}
        self.phases = list(expand_phases(self.recipe))
        check_phases(self.backbone, self.phases, self.recipe, bool(self.scorers))
        self.precision = resolve_precision(self.recipe.train.mixed_precision, self.backbone.device)
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's precision would be refused otherwise
        self.accelerator = Accelerator(mixed_precision=self.precision, cpu=self.backbone.device.type == "cpu")
        self.trained: dict[str, TrainableGroup] = {}  # by slot: all that has been injected so far
        self.best: dict[str, Tensor] = {}
        self.best_score: float | None = None
        self.ports: set[str] = set()
        self.final_scores: dict[str, float] = {}  # of the state that is returned, where it was scored
        self.clock = Clock()  # spent so far, also before an interruption
        self._peak = 0  # bytes, before an interruption
        self._depends: dict[str, str] = {}
        self._anew = True
        text = {n: m for n, m in self.backbone.components.items() if n.startswith("text_encoder")}
        self.offloaded = Offloaded(
            {"vae": self.backbone.vae, **text},
            self.backbone.device,
            placement=getattr(self.backbone, "placement", None),
        )
        self.initial_parameters: dict[str, list[Tensor]] = {}  # what the modifier's own tensors were at first

    @property
    def total_steps(self) -> int:
        return sum(p.train.steps for _, p in self.phases)

    @property
    def costs(self) -> dict[str, Any]:
        """What the run has cost (`shared.train.costs.summary`), and the precision that "auto" became."""
        return {**summary(self.clock, self.backbone.device, self._peak), "mixed_precision": self.precision}

    # --- the run -------------------------------------------------------------------------------------------

    def steps(self, resume: bool = False) -> Iterator[tuple[str, Record]]:
        """Train, yielding (phase, record). With `resume`, from the newest checkpoint in `workdir` on.

        Raises ValueError when the checkpoint belongs to another recipe, NotFinite (after saving the last good state), and
        Interrupted (after saving).
        """
        self._depends = dependencies(self.backbone, self.subjects, self.loaded_strengths)
        self._attach_names()
        check_validation(self.backbone, self.names, self.phases)
        state = checkpoint.load(self.workdir) if resume else None
        self._anew = state is None
        if state is not None:
            self._resume_from(state)
        watch_memory(self.backbone.device)
        first = state.phase if state else 0
        done_before = sum(p.train.steps for _, p in self.phases[:first])
        log = Log(self.workdir, done_before + (state.step if state else 0), self.tensorboard)
        try:
            with self.clock.on("optimisation"):
                for index, (name, phase) in enumerate(self.phases):
                    trained = self._unfreeze(phase)
                    if index < first:
                        continue
                    restored = state if state and state.phase == index else None
                    for record in _Phase(self, index, name, phase, log).run(trained, restored):
                        with self.clock.on(None):
                            yield name, record
                if first >= len(self.phases) and state is not None:
                    restore(self.backbone, self.names, self.run_name, state.learned)
        finally:
            log.close()
            self._freeze()

    def _resume_from(self, state: checkpoint.State) -> None:
        """What a checkpoint says besides its tensors. ValueError when it belongs to another run."""
        info = state.info
        recipe, failed = info.get("recipe", {}), bool(info.get("not_finite"))
        same_recipe(recipe, dump(self.recipe), failed)
        ignored = ()
        if failed and recipe["train"]["mixed_precision"] != self.recipe.train.mixed_precision:
            ignored = (WEIGHTS,)  # the same weights, loaded in another precision
        same_dependencies(info.get("depends", self._depends), self._depends, ignored)
        if self.recipe.train.mixed_precision == recipe["train"]["mixed_precision"]:
            same_precision(info.get("precision", self.precision), self.precision)
        self.best, self.best_score = dict(state.best), info.get("best_score")
        self.final_scores, self._peak = info.get("scores", {}), info.get("peak", 0)
        self.clock = Clock(info.get("seconds"))

    def _attach_names(self) -> None:
        for name, subject in self.subjects.items():
            placeholder = self.recipe.modifier.attach(self.backbone, name, subject.class_noun, self.recipe.seed)
            self.initial_parameters[name] = [p.detach().clone() for p in placeholder.parameters()]
            for other, there in list(self.backbone.placeholders.items()):
                if other != name and confusable(self.backbone, placeholder, there):
                    self.backbone.remove(name)
                    raise ValueError(
                        f"{name!r} and {other!r} would be {placeholder.words!r} and {there.words!r}, which the model "
                        "cannot tell apart: learn them in two runs with other modifier.token, or use "
                        "modifier.kind=learnable_token"
                    )

    def _unfreeze(self, phase: Recipe) -> list[TrainableGroup]:
        """Inject what is new, unfreeze what the phase trains, freeze the rest."""
        self._freeze()
        now = []
        for slot, part in phase.trainable.items():
            known = self.trained.get(slot)
            if known is None:
                known = part.inject(self.backbone, part.adapter_set or self.run_name, slot, phase.seed)
                self.ports.update(known.ports)
            decay = getattr(part, "weight_decay", None)
            group = TrainableGroup(
                slot, known.parameters, part.lr, decay, known.touches_text, part.group, ports=known.ports
            )
            for parameter in group.parameters:
                parameter.requires_grad_(True)
            self.trained[slot] = group
            now.append(group)
        return now

    def _freeze(self) -> None:
        for group in self.trained.values():
            for parameter in group.parameters:
                parameter.requires_grad_(False)

    # --- what phases are given -----------------------------------------------------------------------------

    def context(self, index: int, trained: list[TrainableGroup], resumed_step: int = 0) -> PhaseContext:
        """What a phase's task is given."""
        name, phase = self.phases[index]
        return PhaseContext(
            backbone=self.backbone,
            name=name,
            recipe=phase,
            subjects=self.subjects,
            run_name=self.run_name,
            trained=trained,
            loaded_strengths=self.loaded_strengths,
            initial_parameters=self.initial_parameters,
            examples=lambda: self.examples(phase),
            text_on_device=self.offloaded.on_device,
            folder=self.folder(name),
            make=self._made_now if self.make else None,
            scorers=self.scorers,
            progress=self.on_pictures,
            resumed_step=resumed_step,
        )

    def folder(self, phase: str) -> Path:
        """Where a phase keeps what it makes."""
        return self.workdir / "phases" / phase

    def examples(self, phase: Recipe) -> Iterator[Example]:
        """Everything the phase's sources give, one after another."""
        context = SourceContext(
            subjects=self.subjects,
            resolution=phase.train.resolution or self.backbone.resolution,  # of class pictures, too
            seed=phase.seed,
            cache_dir=self.cache_dir,
            generate=self._plain_class_pictures if self.class_pictures else None,
            backbone_key=model_key(self.backbone, self.loaded_strengths),
            phase_folders={n: self.folder(n) for n, p in self.phases if (self.folder(n)).is_dir()},
            progress=self.on_pictures,
        )
        for source in phase.sources.values():
            given = source.examples(context)
            while True:
                with self.clock.on("class_pictures"):
                    example = next(given, None)
                if example is None:
                    break
                yield example

    def _plain_class_pictures(self, prompts: Any, seeds: Any, **how: Any) -> Tensor:
        """Class pictures: what was loaded before is on, what is in training is off."""
        assert self.class_pictures is not None
        with self.backbone.active(self.loaded_strengths), self.accelerator.autocast():
            return self.class_pictures(prompts, seeds, **how)

    def _made_now(self, prompts: Any, seeds: Any, recipe: Recipe) -> Tensor:
        assert self.make is not None
        with self.offloaded.on_device(), self.accelerator.autocast(), self.clock.on("pictures"):
            return self.make(prompts, seeds, recipe)

    def save(self, state: checkpoint.State, scaler: Mapping[str, float], not_finite: bool = False) -> None:
        """Write a checkpoint of a task's state, with what the run knows besides."""
        info = {
            "recipe": dump(self.recipe),
            "depends": self._depends,
            "best_score": self.best_score,
            "scores": self.final_scores,
            "seconds": self.clock.spent,
            "peak": self.costs["training_peak_memory"],
            "scaler": dict(scaler),
            "not_finite": not_finite,
            "precision": self.precision,
            **state.info,
        }
        checkpoint.save(
            self.workdir,
            checkpoint.State(state.phase, state.step, state.learned, state.optimizer, self.best, info),
        )

    def begin(self) -> None:
        """Nothing can be wrong any more: what an earlier run left is removed, once."""
        if self._anew:
            checkpoint.clear(self.workdir)
            self._anew = False


class _Phase:
    """One phase of a run, from its task's first step to its result."""

    def __init__(self, run: TrainingRun, index: int, name: str, recipe: Recipe, log: Log) -> None:
        self.owner, self.index, self.name, self.recipe, self.log = run, index, name, recipe, log
        self.offset = sum(p.train.steps for _, p in run.phases[:index])
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
            if stop.is_set():  # it came when the last step was done
                raise Interrupted

    def _enter(self, stack: ExitStack) -> None:
        """What holds while the phase runs."""
        owner, backbone = self.owner, self.owner.backbone
        side = self.recipe.train.resolution or backbone.resolution
        stack.enter_context(recomputed(backbone.denoiser, self.recipe.train.gradient_checkpointing))
        stack.enter_context(backbone.attending(unfused=pays(backbone, side)))
        stack.callback(self._dropout, False)
        stack.callback(owner.offloaded.restore)
        self._dropout(True)
        if owner.offloaded.on:  # on a GPU, what the steps do not need makes room for what they do
            needed = frozenset(getattr(self.task, "networks_in_steps", owner.offloaded.networks))
            owner.offloaded.offload(*(n for n in owner.offloaded.networks if n not in needed))

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
        )

    def _after(self) -> None:
        """After a step: pictures and their scores, the best state, a checkpoint."""
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
        """Save the state before the update that led to a loss that is no number, and say what can be done."""
        owner = self.owner
        before = self.good.put_back()
        if before is not None or (self.step == self.start and checkpoint.load(owner.workdir) is None):
            self.step = before if before is not None else self.start
            self._save(not_finite=True)
        elif (newest := checkpoint.load(owner.workdir)) is not None:
            self.step = newest.step
            checkpoint.amend(owner.workdir, not_finite=True)
        else:
            return "no good state is left. Lower the learning rate (trainable.*.lr), and start anew."
        return (
            f"the state of step {self.step}, before it went wrong, is kept in {owner.workdir}. Lower the learning rate "
            "(trainable.*.lr), or set train.mixed_precision=no, and go on with --resume."
        )

    def _finish(self) -> None:
        """End of a phase: back to its best state when one was kept; the next phase starts from there."""
        owner = self.owner
        self.optimizers.average(True)
        if owner.best:
            self.task.load_state_dict(owner.best)
        owner.best, owner.best_score = {}, None
        self.task.result()
        owner.save(checkpoint.State(self.index + 1, 0, self._learned()), {})

    def _learned(self) -> dict[str, Tensor]:
        owner = self.owner
        return gather(owner.backbone, owner.names, owner.run_name)

    def _save(self, not_finite: bool = False) -> None:
        info = {"progress": self.optimizers.progress()}
        state = checkpoint.State(self.index, self.step, self.task.state_dict(), self.optimizers.state_dict(), info=info)
        self.owner.save(state, self.optimizers.scaler_state(), not_finite)

    def _dropout(self, on: bool) -> None:
        owner = self.owner
        for adapter in owner.backbone.adapters.get(owner.run_name, []):
            if hasattr(adapter, "train"):
                adapter.train(on)  # type: ignore[attr-defined]
