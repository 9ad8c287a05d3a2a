"""One run from pictures to learned tensors: phases, checkpoints, pictures while training, the best state, interruption."""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.recipe import Recipe
from shared.recipes import dump, expand_phases
from shared.sources.context import Generate, SourceContext
from shared.train import checkpoint
from shared.train.learned import gather, restore
from shared.train.log import Log
from shared.train.loop import NotFinite, Record, run
from shared.train.optim import Optimizers
from shared.train.tune import Tune
from shared.trainable import Woken
from shared.types import Example, Subject


class Preview(Protocol):
    """Pictures of the state in training, and their scores ("score": the higher the better)."""

    def __call__(self, phase: str, step: int) -> tuple[Tensor, Mapping[str, float]]: ...


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved."""


@dataclass
class Session:
    """Tunes `backbone` on `subjects`. Concepts attached before stay on at `others` strength; what is learned is attached
    under the subjects' names (tokens) and `run_name` (adapters) and stays there afterwards."""

    backbone: Backbone
    recipe: Recipe
    subjects: Mapping[str, Subject]
    workdir: Path
    cache_dir: Path
    generate: Generate | None = None
    preview: Preview | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    tensorboard: bool = True
    on_picture: Callable[[Path], None] | None = None

    def __post_init__(self) -> None:
        self.names = list(self.subjects)
        self.run_name = "+".join(self.names)
        self.class_nouns = {n: s.class_noun for n, s in self.subjects.items()}
        precision = self.recipe.train.mixed_precision
        if precision == "fp16" and self.backbone.device.type == "cpu":
            raise ValueError("train.mixed_precision=fp16 needs a GPU: use bf16 or no")
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run's precision would be refused otherwise
        self.accelerator = Accelerator(mixed_precision=precision, cpu=self.backbone.device.type == "cpu")
        self.phases = list(expand_phases(self.recipe))
        self.woken: dict[str, Woken] = {}
        self.best: dict[str, Tensor] = {}
        self.best_score: float | None = None
        self.ports: set[str] = set()
        self.final_scores: dict[str, float] = {}  # of the state that is returned, where it was scored
        self.seconds, self._since = 0.0, time.perf_counter()  # spent so far, also before an interruption
        self.starts: dict[str, list[Tensor]] = {}  # what the modifier's own tensors were at first

    @property
    def total_steps(self) -> int:
        return sum(p.train.steps for _, p in self.phases)

    def steps(self, resume: bool = False) -> Iterator[tuple[str, Record]]:
        """Train, yielding (phase, record). With `resume`, go on from the newest checkpoint in `workdir`.

        Raises ValueError when the checkpoint belongs to another recipe, NotFinite (after saving the last good state), and
        Interrupted (after saving).
        """
        self._attach_names()
        state = checkpoint.load(self.workdir) if resume else None
        if state is not None:
            _same_recipe(state.info.get("recipe", {}), dump(self.recipe))
            self.best, self.best_score = dict(state.best), state.info.get("best_score")
            self.final_scores, self.seconds = state.info.get("scores", {}), state.info.get("seconds", 0.0)
        self._since = time.perf_counter()
        first = state.phase if state else 0
        done_before = sum(p.train.steps for _, p in self.phases[:first])
        log = Log(self.workdir, done_before + (state.step if state else 0), self.tensorboard)
        try:
            for index, (name, phase) in enumerate(self.phases):
                woken = self._wake(phase)
                if index < first:
                    continue
                restored = state if state and state.phase == index else None
                for record in self._phase(index, name, phase, woken, restored, log):
                    yield name, record
            if first >= len(self.phases) and state is not None:
                restore(self.backbone, self.names, self.run_name, state.learned)
        finally:
            log.close()
            self._rest()

    def examples(self, phase: Recipe) -> list[Example]:
        """Everything the phase's sources give."""
        context = SourceContext(
            subjects=self.subjects,
            resolution=phase.train.resolution or self.backbone.resolution,
            seed=phase.seed,
            cache_dir=self.cache_dir,
            generate=self._plain_generate if self.generate else None,
            backbone_key=self._key(),
        )
        return [e for source in phase.sources.values() for e in source.examples(context)]

    def _plain_generate(self, prompts: Any, seeds: Any, *, guidance: float, steps: int) -> Tensor:
        """Class pictures: what was loaded before is on, what is in training is off."""
        assert self.generate is not None
        with self.backbone.active(self.others):
            return self.generate(prompts, seeds, guidance=guidance, steps=steps)

    def _key(self) -> str:
        """What class pictures depend on besides their settings: the weights, and the concepts that are on."""
        digest = hashlib.sha256(self.backbone.checkpoint.encode())
        on = {n: s for n, s in self.others.items() if s and n in self.backbone.adapters}
        for name, strength in sorted(on.items()):
            digest.update(repr(strength).encode())
            for adapter in self.backbone.adapters[name]:
                for key, tensor in sorted(adapter.state_dict().items()):
                    digest.update(key.encode() + tensor.numpy().tobytes())
        return digest.hexdigest() if on else self.backbone.checkpoint

    def _attach_names(self) -> None:
        taken = {n.words: name for name, n in self.backbone.namings.items()}
        for name, subject in self.subjects.items():
            naming = self.recipe.modifier.attach(self.backbone, name, subject.class_noun, self.recipe.seed)
            self.starts[name] = [p.detach().clone() for p in naming.parameters()]
            if naming.words and naming.words in taken:
                self.backbone.remove(name)
                raise ValueError(
                    f"{name!r} and {taken[naming.words]!r} would both be called {naming.words!r}: "
                    "give one another modifier.token, or use modifier.kind=learnable_token"
                )
            taken[naming.words] = name

    def _wake(self, phase: Recipe) -> list[Woken]:
        """Inject what is new, wake what the phase trains, put the rest to sleep."""
        self._rest()
        now = []
        for slot, part in phase.trainable.items():
            woken = self.woken.get(slot)
            if woken is None:
                woken = part.inject(self.backbone, self.run_name, slot, phase.seed)
                self.ports.update(woken.ports)
            decay = getattr(part, "weight_decay", None)
            woken = Woken(slot, woken.parameters, part.lr, decay, woken.touches_text, woken.ports)
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
        self, index: int, name: str, phase: Recipe, woken: list[Woken], restored: checkpoint.State | None, log: Log
    ) -> Iterator[Record]:
        optimizers = Optimizers({"main": woken}, phase.train.optimizer, self.accelerator)
        start = 0
        if restored is not None:
            restore(self.backbone, self.names, self.run_name, restored.learned, fresh=restored.step == 0)
            optimizers.load_state_dict(restored.optimizer)
            start = restored.step
        examples = self.examples(phase)
        task = Tune(self.backbone, phase, examples, self.class_nouns, woken, self.others, self.starts)
        offset = sum(p.train.steps for _, p in self.phases[:index])
        step = start
        if not start:
            self.final_scores = {}
        with _interruptible() as stop, _recomputed(self.backbone.denoiser, phase.train.gradient_checkpointing):
            self._dropout(True)
            try:
                for record in run(task, optimizers, phase.train, phase.seed, self.accelerator, start):
                    step = record.step
                    log.scalars(offset + step, _flat(name, record))
                    self._after(index, name, phase, step, offset, optimizers, log)
                    yield record
                    if stop.is_set():
                        self._save(index, step, optimizers)
                        raise Interrupted
            except NotFinite as error:
                self._save(index, step, optimizers)
                raise NotFinite(
                    f"{error} (phase {name}); the state of step {step} is kept in {self.workdir}. "
                    "Lower the learning rate (trainable.*.lr), or train with train.mixed_precision=no."
                ) from None
            finally:
                self._dropout(False)
        self._finish(index)

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
            pixels, scores = self.preview(name, step)
            self._dropout(True)
            log.scalars(offset + step, {f"validation/{k}": v for k, v in scores.items()})
            self._show(offset + step, pixels, log)
            score = scores.get("score")
            if not check.keep_best or score is None:
                self.final_scores = dict(scores)
            if check.keep_best and score is not None and (self.best_score is None or score > self.best_score):
                self.best, self.best_score = gather(self.backbone, self.names, self.run_name), score
                self.final_scores = {**scores, "step": step}
        every = phase.train.checkpoint_every
        if every and step % every == 0 and step < phase.train.steps:
            self._save(index, step, optimizers)

    def _show(self, step: int, pixels: Tensor, log: Log) -> None:
        from shared.io.sheets import grid

        folder = self.workdir / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{step:06d}.png"
        grid(pixels).save(path)
        for i, picture in enumerate(pixels):
            log.picture(step, f"sample/{i}", (picture + 1) / 2)
        if self.on_picture:
            self.on_picture(path)

    def _save(self, phase: int, step: int, optimizers: Optimizers | None) -> None:
        now = time.perf_counter()
        self.seconds, self._since = self.seconds + now - self._since, now
        info = {
            "recipe": dump(self.recipe),
            "best_score": self.best_score,
            "scores": self.final_scores,
            "seconds": self.seconds,
        }
        learned = gather(self.backbone, self.names, self.run_name)
        moments = optimizers.state_dict() if optimizers else {}
        checkpoint.save(self.workdir, checkpoint.State(phase, step, learned, moments, self.best, info))

    def _dropout(self, on: bool) -> None:
        for adapter in self.backbone.adapters.get(self.run_name, []):
            if hasattr(adapter, "train"):
                adapter.train(on)  # type: ignore[attr-defined]


def _flat(phase: str, record: Record) -> dict[str, float]:
    rates = {f"lr/{k}": v for k, v in record.lr.items()}
    parts = {f"loss/{k}": v for k, v in record.parts.items()}
    return {"loss": record.loss, **parts, **rates, "grad_norm": record.grad_norm}


def _same_recipe(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """ValueError naming the first key in which a checkpoint's recipe differs; output and name may."""
    free = ("output", "name")
    found = _difference(
        {k: v for k, v in old.items() if k not in free}, {k: v for k, v in new.items() if k not in free}
    )
    if found:
        key, before, now = found
        raise ValueError(
            f"the interrupted run had {key} = {before!r}, this one has {now!r}: "
            "resume with the same recipe, or start anew without --resume"
        )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> tuple[str, Any, Any] | None:
    """The first key whose values differ, as deep as it goes, and both values."""
    for key in sorted({*old, *new}):
        before, now = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            inside = _difference(before, now, f"{place}{key}.")
            if inside:
                return inside
        elif before != now:
            return place + key, before, now
    return None


@contextmanager
def _recomputed(network: Any, on: bool) -> Iterator[None]:
    """Inside, activations are not kept but computed again in the backward pass: less memory, more time."""
    if on:
        network.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if on:
            network.disable_gradient_checkpointing()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C lets the step end and the state be saved; the second acts at once."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    ignored = before == signal.SIG_IGN  # nohup and background jobs: Ctrl-C is not for this process
    if ignored or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
