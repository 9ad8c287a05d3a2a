"""Runs a recipe, from pictures to learned tensors. Handles phases, checkpoints, validation and interruptions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.concept.confusable import confusable
from shared.recipe.phases import expand_phases, learns_subjects
from shared.recipe.reads import files_read
from shared.recipe.schema import Recipe, dump
from shared.recipe.tasks import GenerateTask, TuneTask
from shared.sampling.settings import Start
from shared.sources.source_context import Generate as ClassPictures
from shared.sources.source_context import SourceContext
from shared.train import checkpoint
from shared.train.costs import Clock, summary, watch_memory
from shared.train.generate import Generate
from shared.train.learned_state import restore
from shared.train.log import Log
from shared.train.loop import Record
from shared.train.memory import Offloaded
from shared.train.per_source import inject_each, sets_by_file, temporary_sets
from shared.train.phase import Phase
from shared.train.phase_context import MakeNow, PhaseContext, Score, TaskTable
from shared.train.precision import resolve_precision
from shared.train.preflight import check_phases, check_sources, check_validation
from shared.train.resuming import dependencies, model_key, same_dependencies, same_precision, same_recipe
from shared.train.tune import Tune
from shared.trainable import TrainableGroup
from shared.types import Example, Subject

#: The core's tasks; packages add their own.
TASKS: TaskTable = {TuneTask: Tune, GenerateTask: Generate}


class Preview(Protocol):
    """Generates pictures from the current training state and scores them. Higher values of "score" are better."""

    def __call__(self, phase: str, step: int) -> tuple[Tensor, Mapping[str, float]]: ...


@dataclass
class TrainingRun:
    """Runs a recipe's phases on `backbone` for `subjects`.

    Concepts that are already attached stay on at `loaded_strengths`. Learned tokens are attached under the subjects'
    names. Adapters are attached under `run_name`, or under another name if their part sets one; `adapter_sets` lists
    these names. Tokens and adapters stay attached after the run.
    """

    backbone: Backbone
    recipe: Recipe
    subjects: Mapping[str, Subject]
    workdir: Path
    cache_dir: Path
    class_pictures: ClassPictures | None = None  # generates pictures with everything being trained switched off
    make: MakeNow | None = None  # generates pictures with the model in its current state
    preview: Preview | None = None
    scored: bool = True  # whether `preview` returns scores, which then decide which state is kept
    scorers: Mapping[str, Score] = field(default_factory=dict)
    loaded_strengths: Mapping[str, float] = field(default_factory=dict)
    loaded_nouns: Mapping[str, str] = field(default_factory=dict)  # the class nouns of attached concepts, by name
    tensorboard: bool = True
    on_pictures: Callable[[str, int, int], None] | None = None  # (what, done, total) while pictures are generated
    tasks: TaskTable = field(default_factory=lambda: TASKS)

    def __post_init__(self) -> None:
        self.class_nouns = {n: s.class_noun for n, s in self.subjects.items()}
        self.phases = list(expand_phases(self.recipe))
        self.names = list(self.subjects) if learns_subjects(self.recipe) else []
        self.run_name = "+".join(self.names)
        named = [part.adapter_set for _, phase in self.phases for part in phase.trainable.values() if part.adapter_set]
        self.adapter_sets = tuple(dict.fromkeys([self.run_name, *named]))
        self.temporary = temporary_sets(self.phases)
        self.per_source = sets_by_file(self.phases, self.subjects)
        check_sources(self.phases, self.subjects)
        check_phases(self.backbone, self.phases, self.recipe, bool(self.scorers))
        parts = (*self.recipe.attention.values(), self.recipe.sampling)
        self.ports: set[str] = {port for part in parts if (port := part.port(self.backbone))}
        self.precision = resolve_precision(self.recipe.train.mixed_precision, self.backbone.device)
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # otherwise an earlier run's precision would stick
        self.accelerator = Accelerator(mixed_precision=self.precision, cpu=self.backbone.device.type == "cpu")
        self.trained: dict[str, TrainableGroup] = {}  # by slot: everything injected so far
        self.best: dict[str, Tensor] = {}
        self.carried: dict[str, Tensor] = {}  # passed from phase to phase, but not attached to the backbone
        self.best_score: float | None = None
        self.final_scores: dict[str, float] = {}  # of the returned state, if it was scored
        self.clock = Clock()  # time spent so far, including before an interruption
        self._peak = 0  # in bytes, from before an interruption
        self._depends: dict[str, str] = {}
        self._anew = True
        text = {n: m for n, m in self.backbone.components.items() if n.startswith("text_encoder")}
        self.offloaded = Offloaded(
            {"vae": self.backbone.vae, **text},
            self.backbone.device,
            placement=self.backbone.placement,
        )
        self.initial_parameters: dict[str, list[Tensor]] = {}  # the initial values of the modifier's own tensors

    @property
    def total_steps(self) -> int:
        return self.steps_before(len(self.phases))

    def steps_before(self, phase: int) -> int:
        """Returns the total number of steps of all phases before this index."""
        return sum(p.task.count(p.train.steps, len(self.subjects)) for _, p in self.phases[:phase])

    @property
    def costs(self) -> dict[str, Any]:
        """The run's costs (`shared.train.costs.summary`) and the precision that it computes in."""
        return {**summary(self.clock, self.backbone.device, self._peak), "mixed_precision": self.precision}

    # --- the run -------------------------------------------------------------------------------------------

    def steps(self, resume: bool = False) -> Iterator[tuple[str, Record]]:
        """Trains, and yields the phase's name and a record after each step.

        With `resume`, training continues from the newest checkpoint in `workdir`. If the run fails or is stopped before
        its first checkpoint, the folder that it created is removed.

        Raises:
            ValueError: when the checkpoint belongs to another recipe
            NotFinite: when a loss, a gradient or a parameter is not finite, after the last good state has been saved
            Interrupted: when the run is asked to stop, after the state has been saved
        """
        self._depends = dependencies(self.backbone, self.subjects, self.loaded_strengths, files_read(self.recipe))
        self._attach_names()
        check_validation(self.backbone, self.names, self.phases)
        state = checkpoint.load(self.workdir) if resume else None
        self._anew = state is None
        if state is not None:
            self._resume_from(state)
        watch_memory(self.backbone.device)
        first = state.phase if state else 0
        done_before = self.steps_before(first)
        log = Log(self.workdir, done_before + (state.step if state else 0), self.tensorboard)
        made, failed = not self.workdir.exists(), False
        try:
            with self.clock.on("optimisation"):
                for index, (name, phase) in enumerate(self.phases):
                    trained = self._unfreeze(phase)
                    if index < first:
                        continue
                    restored = state if state and state.phase == index else None
                    for record in Phase(self, index, name, phase, log).run(trained, restored):
                        with self.clock.on(None):
                            yield name, record
                if first >= len(self.phases) and state is not None:
                    restore(self.backbone, self.names, self.sets_of_the_run, state.learned)
        except (Exception, KeyboardInterrupt):
            failed = True
            raise
        finally:
            log.close()
            self._freeze()
            if made and failed:
                checkpoint.clear_if_none(self.workdir)

    def _resume_from(self, state: checkpoint.State) -> None:
        """Restores the run's own state from a checkpoint. Phases restore the learned tensors and the optimizers.

        Raises ValueError when the checkpoint belongs to another run.
        """
        info = state.info
        recipe, failed = info.get("recipe", {}), bool(info.get("not_finite"))
        # each preview switches a schedule-free optimizer to its average and back, and rounding then changes the result
        averaged = any(o.averages for _, phase in self.phases for o in phase.train.optimizers.values())
        same_recipe(recipe, dump(self.recipe), failed, scored=self.scored or averaged)
        same_dependencies(info.get("depends", self._depends), self._depends)
        if self.recipe.train.mixed_precision == recipe["train"]["mixed_precision"]:
            same_precision(info.get("precision", self.precision), self.precision)
        self.best, self.best_score = dict(state.best), info.get("best_score")
        self.carried = dict(state.carried)
        self.final_scores, self._peak = info.get("scores", {}), info.get("peak", 0)
        self.clock = Clock(info.get("seconds"))

    def _attach_names(self) -> None:
        for name in self.names:
            placeholder = self.recipe.modifier.attach(self.backbone, name, self.class_nouns[name], self.recipe.seed)
            self.initial_parameters[name] = [p.detach().clone() for p in placeholder.parameters()]
            for other, loaded in list(self.backbone.placeholders.items()):
                if other != name and confusable(self.backbone, placeholder, loaded):
                    self.backbone.remove(name)
                    raise ValueError(
                        f"{name!r} and {other!r} would be called {placeholder.words!r} and {loaded.words!r}, which the "
                        "model cannot tell apart: learn them in separate runs with different modifier.token values, or "
                        "use modifier.kind=learnable_token"
                    )

        for name in (self.run_name, *self.names):
            edits = [edit for part in self.recipe.attention.values() for edit in part.edits(self.backbone)]
            self.backbone.keep_attending(name, *edits)

    def _unfreeze(self, phase: Recipe) -> list[TrainableGroup]:
        """Injects the phase's new adapters, unfreezes the parameters that it trains, and freezes all others."""
        self._freeze()
        now = []
        for slot, part in phase.trainable.items():
            known = self.trained.get(slot)
            if known is None:
                if part.per_source:
                    known = inject_each(part, self.backbone, slot, self.subjects, phase.seed)
                else:
                    known = part.inject(self.backbone, part.adapter_set or self.run_name, slot, phase.seed)
                if part.temporary:
                    self.backbone.set_strength(part.adapter_set, 0.0)  # a training step switches it on
                self.ports.update(known.ports)
            group = replace(known, lr=part.lr, weight_decay=part.weight_decay, group=part.group)
            for parameter in group.parameters:
                parameter.requires_grad_(True)
            self.trained[slot] = group
            now.append(group)
        return now

    @property
    def sets_of_the_run(self) -> tuple[str, ...]:
        """Every adapter set of this run, including the sets that belong to individual files."""
        return (*self.adapter_sets, *(name for names in self.per_source.values() for name in names))

    @property
    def kept_sets(self) -> tuple[str, ...]:
        """The adapter sets that are saved in the concepts."""
        return tuple(name for name in self.adapter_sets if name not in self.temporary)

    def _freeze(self) -> None:
        for group in self.trained.values():
            for parameter in group.parameters:
                parameter.requires_grad_(False)

    # --- what phases receive -------------------------------------------------------------------------------

    def context(self, index: int, trained: list[TrainableGroup], resumed_step: int = 0) -> PhaseContext:
        """Builds the context for a phase's task."""
        name, phase = self.phases[index]
        return PhaseContext(
            backbone=self.backbone,
            name=name,
            recipe=phase,
            subjects=self.subjects,
            names=self.names,
            adapter_sets=self.sets_of_the_run,
            per_source=self.per_source,
            temporary=self.temporary,
            trained=trained,
            loaded_strengths=self.loaded_strengths,
            initial_parameters=self.initial_parameters,
            examples=lambda: self.examples(phase),
            text_on_device=self.offloaded.on_device,
            folder=self.folder(name),
            phase_folders={n: self.folder(n) for n, _ in self.phases[:index]},
            make=self._made_now if self.make else None,
            scorers=self.scorers,
            progress=self.on_pictures,
            carried=self.carried,
            earlier=[recipe for _, recipe in self.phases[:index]],
            resumed_step=resumed_step,
            loaded_nouns=self.loaded_nouns,
        )

    def folder(self, phase: str) -> Path:
        """Returns the folder for a phase's files."""
        return self.workdir / "phases" / phase

    def _before(self, phase: Recipe) -> list[str]:
        """Returns the names of the phases before this one.

        This phase must not learn from later phases' files, which an earlier run may have left behind.
        """
        return [name for name, _ in takewhile(lambda entry: entry[1] is not phase, self.phases)]

    def examples(self, phase: Recipe) -> Iterator[Example]:
        """Yields every example of the phase's sources, source by source."""
        context = SourceContext(
            subjects=self.subjects,
            resolution=phase.train.resolution or self.backbone.resolution,  # also used for class pictures
            seed=phase.seed,
            cache_dir=self.cache_dir,
            generate=self._plain_class_pictures if self.class_pictures else None,
            backbone_key=model_key(self.backbone, self.loaded_strengths),
            phase_folders={n: self.folder(n) for n in self._before(phase) if self.folder(n).is_dir()},
            progress=self.on_pictures,
        )
        for source in phase.sources.values():
            examples = source.examples(context)
            while True:
                with self.clock.on("class_pictures"):
                    example = next(examples, None)
                if example is None:
                    break
                yield example

    def _plain_class_pictures(self, prompts: Any, seeds: Any, **how: Any) -> Tensor:
        """Generates class pictures with loaded concepts switched on and everything being trained switched off."""
        assert self.class_pictures is not None
        with self.backbone.active(self.loaded_strengths), self.accelerator.autocast():
            return self.class_pictures(prompts, seeds, **how)

    def _made_now(self, prompts: Any, seeds: Any, recipe: Recipe, start: Start | None = None) -> Tensor:
        assert self.make is not None
        with self.offloaded.on_device(), self.accelerator.autocast(), self.clock.on("pictures"):
            return self.make(prompts, seeds, recipe, start)

    def save(self, state: checkpoint.State, scaler: Mapping[str, float], not_finite: bool = False) -> None:
        """Writes a checkpoint of a task's state, together with the run's own state."""
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
            checkpoint.State(state.phase, state.step, state.learned, state.optimizer, self.best, info, self.carried),
        )

    def begin(self) -> None:
        """Removes what an earlier run left behind, unless this run resumes it.

        Must be called after all checks have passed. Only the first call has an effect.
        """
        if self._anew:
            checkpoint.clear(self.workdir)
            self._anew = False
