"""One run from pictures to learned tensors: phases, checkpoints, pictures while training, the best state, interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from shared.backbones.attention import pays, unfused_attention
from shared.backbones.protocol import Backbone
from shared.recipe.resolve import dump, expand_phases
from shared.recipe.schema import Recipe
from shared.sources.base import Generate, SourceContext
from shared.train import checkpoint
from shared.train.costs import Clock, summary, watch_memory
from shared.train.last_good_state import LastGood
from shared.train.learned_state import gather, restore
from shared.train.log import Log, flat
from shared.train.loop import Record, run
from shared.train.memory import Offloaded, recomputed
from shared.train.optim import NotFinite, Optimizers
from shared.train.precision import resolve_precision
from shared.train.preflight import check_phases, check_validation
from shared.train.resuming import WEIGHTS, dependencies, model_key, same_dependencies, same_precision, same_recipe
from shared.train.signals import interruptible
from shared.train.tune import Tune
from shared.trainable import TrainableGroup
from shared.types import Example, Subject


class Preview(Protocol):
    """Pictures of the state in training, and their scores ("score": the higher the better)."""

    def __call__(self, phase: str, step: int) -> tuple[Tensor, Mapping[str, float]]: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved."""


@dataclass
class Session:
    """Tunes `backbone` on `subjects`. Concepts attached before stay on at `loaded_strengths` strength; what is learned is attached
    under the subjects' names (tokens) and `run_name` (adapters) and stays there afterwards."""

    backbone: Backbone
    recipe: Recipe
    subjects: Mapping[str, Subject]
    workdir: Path
    cache_dir: Path
    generate: Generate | None = None
    preview: Preview | None = None
    loaded_strengths: Mapping[str, float] = field(default_factory=dict)
    tensorboard: bool = True
    on_pictures: Callable[[str, int, int], None] | None = None  # (what, done, of) while class pictures are made

    def __post_init__(self) -> None:
        self.names = list(self.subjects)
        self.run_name = "+".join(self.names)
        self.class_nouns = {n: s.class_noun for n, s in self.subjects.items()}
        self.phases = list(expand_phases(self.recipe))
        check_phases(self.backbone, self.phases, self.recipe)
        self.precision = resolve_precision(self.recipe.train.mixed_precision, self.backbone.device)
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's precision would be refused otherwise
        self.accelerator = Accelerator(mixed_precision=self.precision, cpu=self.backbone.device.type == "cpu")
        self.woken: dict[str, TrainableGroup] = {}
        self.best: dict[str, Tensor] = {}
        self.best_score: float | None = None
        self.ports: set[str] = set()
        self.final_scores: dict[str, float] = {}  # of the state that is returned, where it was scored
        self.clock = Clock()  # spent so far, also before an interruption
        self._peak = 0  # bytes, before an interruption
        self._depends: dict[str, str] = {}
        self._anew = True
        text = {n: m for n, m in self.backbone.components.items() if n.startswith("text_encoder")}
        vae = getattr(self.backbone, "vae", None)
        self.offloaded = Offloaded(text if vae is None else {"vae": vae, **text}, self.backbone.device)
        self.initial_parameters: dict[str, list[Tensor]] = {}  # what the modifier's own tensors were at first

    @property
    def total_steps(self) -> int:
        return sum(p.train.steps for _, p in self.phases)

    @property
    def costs(self) -> dict[str, Any]:
        """What the run has cost (`shared.train.costs.summary`), and the precision that "auto" became."""
        return {**summary(self.clock, self.backbone.device, self._peak), "mixed_precision": self.precision}

    def steps(self, resume: bool = False) -> Iterator[tuple[str, Record]]:
        """Train, yielding (phase, record). With `resume`, go on from the newest checkpoint in `workdir`.

        Raises ValueError when the checkpoint belongs to another recipe, NotFinite (after saving the last good state), and
        Interrupted (after saving).
        """
        self._depends = dependencies(self.backbone, self.subjects, self.loaded_strengths)
        self._attach_names()
        check_validation(self.backbone, self.names, self.phases)
        state = checkpoint.load(self.workdir) if resume else None
        self._anew = state is None
        if state is not None:
            self._go_on(state)
        watch_memory(self.backbone.device)
        first = state.phase if state else 0
        done_before = sum(p.train.steps for _, p in self.phases[:first])
        log = Log(self.workdir, done_before + (state.step if state else 0), self.tensorboard)
        try:
            with self.clock.on("optimisation"):
                for index, (name, phase) in enumerate(self.phases):
                    woken = self._wake(phase)
                    if index < first:
                        continue
                    restored = state if state and state.phase == index else None
                    for record in self._phase(index, name, phase, woken, restored, log):
                        with self.clock.on(None):
                            yield name, record
                if first >= len(self.phases) and state is not None:
                    restore(self.backbone, self.names, self.run_name, state.learned)
        finally:
            log.close()
            self._rest()

    def _go_on(self, state: checkpoint.State) -> None:
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

    def examples(self, phase: Recipe) -> list[Example]:
        """Everything the phase's sources give."""
        context = SourceContext(
            subjects=self.subjects,
            resolution=phase.train.resolution or self.backbone.resolution,  # of class pictures, too
            seed=phase.seed,
            cache_dir=self.cache_dir,
            generate=self._plain_generate if self.generate else None,
            backbone_key=model_key(self.backbone, self.loaded_strengths),
            progress=self.on_pictures,
        )
        with self.clock.on("class_pictures"):
            return [e for source in phase.sources.values() for e in source.examples(context)]

    def _plain_generate(self, prompts: Any, seeds: Any, **how: Any) -> Tensor:
        """Class pictures: what was loaded before is on, what is in training is off."""
        assert self.generate is not None
        with self.backbone.active(self.loaded_strengths), self.accelerator.autocast():
            return self.generate(prompts, seeds, **how)

    def _attach_names(self) -> None:
        taken = {n.words: name for name, n in self.backbone.placeholders.items()}
        for name, subject in self.subjects.items():
            placeholder = self.recipe.modifier.attach(self.backbone, name, subject.class_noun, self.recipe.seed)
            self.initial_parameters[name] = [p.detach().clone() for p in placeholder.parameters()]
            if placeholder.words and placeholder.words in taken:
                self.backbone.remove(name)
                raise ValueError(
                    f"{name!r} and {taken[placeholder.words]!r} would both be called {placeholder.words!r}: "
                    "learn them in two runs with other modifier.token, or use modifier.kind=learnable_token"
                )
            taken[placeholder.words] = name

    def _wake(self, phase: Recipe) -> list[TrainableGroup]:
        """Inject what is new, wake what the phase trains, put the rest to sleep."""
        self._rest()
        now = []
        for slot, part in phase.trainable.items():
            woken = self.woken.get(slot)
            if woken is None:
                woken = part.inject(self.backbone, self.run_name, slot, phase.seed)
                self.ports.update(woken.ports)
            decay = getattr(part, "weight_decay", None)
            woken = TrainableGroup(slot, woken.parameters, part.lr, decay, woken.touches_text, woken.ports)
            for parameter in woken.parameters:
                parameter.requires_grad_(True)
            self.woken[slot] = woken
            now.append(woken)
        if not now and phase.train.steps:
            raise ValueError("the recipe trains nothing: add a part under trainable, for example trainable.lora.rank=8")
        return now

    def _rest(self) -> None:
        for woken in self.woken.values():
            for parameter in woken.parameters:
                parameter.requires_grad_(False)

    def _phase(
        self,
        index: int,
        name: str,
        phase: Recipe,
        woken: list[TrainableGroup],
        restored: checkpoint.State | None,
        log: Log,
    ) -> Iterator[Record]:
        optimizers = Optimizers({"main": woken}, phase.train.optimizer, self.accelerator)
        start = 0
        if restored is not None:
            restore(self.backbone, self.names, self.run_name, restored.learned, fresh=restored.step == 0)
            optimizers.load_state_dict(restored.optimizer)
            optimizers.load_scaler_state(restored.info.get("scaler", {}))
            start = restored.step
        examples, good = self.examples(phase), LastGood(optimizers)
        task = Tune(
            self.backbone,
            phase,
            examples,
            self.class_nouns,
            woken,
            self.loaded_strengths,
            self.initial_parameters,
            self.offloaded.on_device,
        )
        offset = sum(p.train.steps for _, p in self.phases[:index])
        step = start
        if not start:
            self.final_scores = {}
        network, side = self.backbone.denoiser, phase.train.resolution or self.backbone.resolution
        recompute = recomputed(network, phase.train.gradient_checkpointing)
        with interruptible() as stop, recompute, unfused_attention(network, pays(self.backbone, side)):
            self._dropout(True)
            try:
                if self._anew:  # nothing can be wrong any more: what an earlier run left goes
                    checkpoint.clear(self.workdir)
                    self._anew = False
                self._offload(task)
                for record in run(task, optimizers, phase.train, phase.seed, self.accelerator, start, good):
                    step = record.step
                    log.scalars(offset + step, flat(record))
                    self._after(index, name, phase, step, offset, optimizers, log)
                    yield record
                    if stop.is_set():
                        self._save(index, step, optimizers)
                        raise Interrupted
            except NotFinite as error:
                kept = self._keep_good(index, step, start, optimizers, good)
                raise NotFinite(f"{error} (phase {name}); {kept}") from None
            finally:
                self.offloaded.restore()
                self._dropout(False)
        self._finish(index)

    def _offload(self, task: Tune) -> None:
        """On a GPU: what the steps do not need makes room for what they do."""
        if self.offloaded.on and task.data.cached:
            task.data.fill()
            text = [n for n in self.offloaded.networks if n != "vae"] if task.text_frozen else []
            self.offloaded.offload("vae", *text)

    def _keep_good(self, index: int, step: int, start: int, optimizers: Optimizers, good: LastGood) -> str:
        """Save the state before the update that led to a loss that is no number, and say what can be done."""
        before = good.put_back()
        if before is not None or (step == start and checkpoint.load(self.workdir) is None):
            step = before if before is not None else start
            self._save(index, step, optimizers, not_finite=True)
        elif (newest := checkpoint.load(self.workdir)) is not None:
            step = newest.step
            checkpoint.amend(self.workdir, not_finite=True)
        else:
            return "no good state is left. Lower the learning rate (trainable.*.lr), and start anew."
        return (
            f"the state of step {step}, before it went wrong, is kept in {self.workdir}. Lower the learning rate "
            "(trainable.*.lr), or set train.mixed_precision=no, and go on with --resume."
        )

    def _finish(self, index: int) -> None:
        """End of a phase: go back to its best state when one was kept; the next phase starts from there."""
        if self.best:
            restore(self.backbone, self.names, self.run_name, self.best)
        self.best, self.best_score = {}, None
        self._save(index + 1, 0, None)

    def _after(
        self, index: int, name: str, phase: Recipe, step: int, offset: int, optimizers: Optimizers, log: Log
    ) -> None:
        check = phase.train.validation
        if self.preview and check.every and (step % check.every == 0 or step == phase.train.steps):
            self._dropout(False)
            with self.clock.on("validation"), self.offloaded.on_device(), self.accelerator.autocast():
                pixels, scores = self.preview(name, step)
            self._dropout(True)
            log.scalars(offset + step, {f"validation/{k}": v for k, v in scores.items()})
            log.samples(offset + step, pixels)
            score = scores.get("score")
            if not check.keep_best or score is None:
                self.final_scores = dict(scores)
            if check.keep_best and score is not None and (self.best_score is None or score > self.best_score):
                self.best, self.best_score = gather(self.backbone, self.names, self.run_name), score
                self.final_scores = {**scores, "step": step}
        every = phase.train.checkpoint_every
        if every and step % every == 0 and step < phase.train.steps:
            self._save(index, step, optimizers)

    def _save(self, phase: int, step: int, optimizers: Optimizers | None, not_finite: bool = False) -> None:
        info = {
            "recipe": dump(self.recipe),
            "depends": self._depends,
            "best_score": self.best_score,
            "scores": self.final_scores,
            "seconds": self.clock.spent,
            "peak": self.costs["training_peak_memory"],
            "scaler": optimizers.scaler_state() if optimizers else {},
            "not_finite": not_finite,
            "precision": self.precision,
        }
        learned = gather(self.backbone, self.names, self.run_name)
        moments = optimizers.state_dict() if optimizers else {}
        checkpoint.save(self.workdir, checkpoint.State(phase, step, learned, moments, self.best, info))

    def _dropout(self, on: bool) -> None:
        for adapter in self.backbone.adapters.get(self.run_name, []):
            if hasattr(adapter, "train"):
                adapter.train(on)  # type: ignore[attr-defined]
