"""Tests that the contexts of a loss stay open during its backward pass, which may recompute layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.regularize.base import Penalty
from shared.train.budget import Budget
from shared.train.loop import Loop
from shared.train.optim import Optimizers
from shared.train.task import Update
from shared.trainable import Lora, TrainableGroup
from shared.types import Batch, Step
from tests.core.runs import paint, predicted, session, small, tuning


class UnderHalfStrength:
    """A task whose loss is computed with the trained adapter at half strength, as in distillation."""

    steps = 1

    def __init__(self, backbone: Any, group: TrainableGroup, inside: bool) -> None:
        self.backbone, self.group, self.inside = backbone, group, inside

    def groups(self) -> dict[str, list[TrainableGroup]]:
        return {"main": [self.group]}

    def loss(self) -> Tensor:
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
        return (self.backbone.predict(x, torch.tensor([200, 700]), self.backbone.encode(["a mug"] * 2)) ** 2).mean()

    def updates(self, step: int, micro: int) -> Iterator[Update]:
        if not self.inside:
            with self.backbone.active({"mug": 0.5}):
                loss = self.loss()
            yield Update(loss)
            return
        with self.backbone.active({"mug": 0.5}):
            yield Update(self.loss())


def gradients(tiny: Callable[[], Any], checkpointing: bool, inside: bool = True) -> Tensor:
    backbone = tiny()
    group = Lora(rank=2).inject(backbone, "mug", "lora", seed=0)
    draw = torch.Generator().manual_seed(1)
    for p in group.parameters:
        p.data = torch.randn(p.shape, generator=draw) * 0.3
    if checkpointing:
        backbone.denoiser.enable_gradient_checkpointing()
        backbone.denoiser.train()  # diffusers recomputes layers only in training mode
    task = UnderHalfStrength(backbone, group, inside)
    optimizers, accelerator = Optimizers(task.groups(), {}, Accelerator(cpu=True)), Accelerator(cpu=True)
    kept: list[Tensor] = []
    before = optimizers.step

    def spy(*args: Any, **kwargs: Any) -> float:
        kept.extend(p.grad.clone().flatten() for p in group.parameters if p.grad is not None)
        return before(*args, **kwargs)

    optimizers.step = spy  # type: ignore[method-assign]
    list(Loop(task, optimizers, Budget(steps=1), 0, accelerator).run())  # type: ignore[arg-type]
    assert backbone.strengths == {"mug": 1.0}, "the context was exited after the step"
    return torch.cat(kept)


def test_a_loss_yielded_inside_its_context_has_the_right_gradient(tiny):
    right = gradients(tiny, checkpointing=False)
    assert torch.allclose(gradients(tiny, checkpointing=True), right, atol=1e-6)
    wrong = gradients(tiny, checkpointing=True, inside=False)
    assert (wrong - right).norm() > 0.05 * right.norm(), (
        "outside the context, recomputed layers would run at a different strength"
    )


# --- needs that keep a context open around the prediction -----------------------------------------


class Watch:
    """A need that records the batch size of every run of the denoiser while the need's context is open."""

    name = "runs"

    def __init__(self) -> None:
        self.open: list[str] = []

    @contextmanager
    def around(self, backbone: Backbone, batch: Batch) -> Iterator[list[int]]:
        runs: list[int] = []
        handle = backbone.denoiser.register_forward_hook(lambda *_: runs.append(batch.size))
        self.open.append("entered")
        try:
            yield runs
        finally:
            handle.remove()
            self.open.append("left")

    def value(self, step: Step, entered: list[int]) -> list[int]:
        return entered


WATCH = Watch()


class Watches(Penalty):
    needs: ClassVar[frozenset[str]] = frozenset({"runs"})
    provides: ClassVar[tuple[Any, ...]] = (WATCH,)
    kind: str = "watches"

    def __call__(self, step: Step) -> Tensor:
        assert step.need("runs") == [step.batch.size], "the context was entered before the prediction"
        assert WATCH.open[-1] == "entered"
        return step.prediction.mean() * 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return paint(tmp_path_factory.mktemp("contexts") / "photos")


def watching(tiny: Callable[[], Any], photos: Any, folder: Any) -> Any:
    recipe = small("textual_inversion")
    recipe = recipe.model_copy(update={"regularize": {"watch": Watches()}})
    return tuning(session(tiny(), recipe, photos, folder))


def test_a_part_may_provide_a_need_whose_context_stays_open_during_the_backward_pass(tiny, photos, tmp_path):
    task = watching(tiny, photos, tmp_path)
    WATCH.open.clear()
    updates = task.updates(0, 0)
    update = next(updates)
    assert WATCH.open == ["entered"], "the context is still open while the loss is used"
    update.loss.backward()
    updates.close()
    assert WATCH.open == ["entered", "left"]


def test_a_batch_contains_pixels_and_sources_only_if_they_are_requested(tiny, photos, tmp_path):
    class WantsPixels(Watches):
        needs: ClassVar[frozenset[str]] = frozenset({"pixels"})
        provides: ClassVar[tuple[Any, ...]] = ()

    recipe = small("textual_inversion")
    plain = predicted(tuning(session(tiny(), recipe, photos, tmp_path / "a")))
    recipe = recipe.model_copy(update={"regularize": {"wants": WantsPixels()}})
    step = predicted(tuning(session(tiny(), recipe, photos, tmp_path / "b")))
    assert plain.batch.pixels is None and step.batch.pixels is not None
    assert step.need("pixels").shape == (2, 3, 32, 32) and torch.equal(step.x_t, plain.x_t)
    assert all(source.endswith(".png") for source in step.batch.sources) and len(step.batch.sources) == 2
