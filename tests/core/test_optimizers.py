"""Each group of parameters can have its own optimizer, which matches the library's and can be saved and restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from shared.config import validate
from shared.optimizers import AdamW, Lbfgs, OptimizerPart, Prodigy, ScheduleFree
from shared.recipe.schema import Train
from shared.train.budget import Budget
from shared.train.loop import Loop
from shared.train.optim import Optimizers
from shared.train.task import Update
from shared.trainable import TrainableGroup
from tests.core.runs import finish, paint, same, session, small


class Bowl:
    """Two coupled groups of parameters with quadratic losses. The first loss has noise that depends on the step."""

    steps = 6

    def __init__(self) -> None:
        self.a = nn.Parameter(torch.tensor([2.0, -1.0]))
        self.b = nn.Parameter(torch.tensor([0.5]))

    def groups(self) -> dict[str, list[TrainableGroup]]:
        return {"main": [TrainableGroup("a", [self.a], lr=0.1)], "words": [TrainableGroup("b", [self.b], lr=0.2)]}

    def updates(self, step: int, micro: int):
        noise = torch.rand(2)  # seeded by the loop with (seed, step, micro)
        yield Update(((self.a - noise) ** 2).sum() + ((self.b - 3) ** 2).sum() + (self.a.sum() * self.b).sum() * 0.1)

    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a.detach().clone(), self.b.detach().clone()


def run(
    task: Bowl, settings: dict[str, OptimizerPart], start: int = 0, steps: int = 6, saved: Any = None
) -> Optimizers:
    accelerator = Accelerator(cpu=True)
    optimizers = Optimizers(task.groups(), settings, accelerator)
    if saved is not None:
        optimizers.load_state_dict(saved[0])
        optimizers.load_progress(saved[1])
    list(Loop(task, optimizers, Budget(steps=steps), 7, accelerator).run(start))  # type: ignore[arg-type]
    return optimizers


KINDS: dict[str, OptimizerPart] = {
    "adamw": AdamW(),
    "prodigy": Prodigy(),
    "schedule_free": ScheduleFree(),
    "lbfgs": Lbfgs(max_iter=3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_and_resumed_run_equals_an_uninterrupted_one(kind):
    whole, part = Bowl(), Bowl()
    run(whole, {"main": KINDS[kind]})
    first = run(part, {"main": KINDS[kind]}, steps=4)
    flat, progress = first.state_dict(), first.progress()
    assert all(isinstance(v, torch.Tensor) for v in flat.values()), "safetensors can store only tensors"
    run(part, {"main": KINDS[kind]}, start=4, saved=(flat, progress))
    assert all(torch.equal(x, y) for x, y in zip(whole.state(), part.state(), strict=True))
    assert not torch.equal(whole.a, Bowl().a) and not torch.equal(whole.b, Bowl().b)


def test_each_group_uses_the_optimizer_it_was_given():
    """Compares the optimizers with direct calls to the two libraries."""
    from prodigyopt import Prodigy as Theirs

    task, plain = Bowl(), Bowl()
    optimizers = run(task, {"main": Prodigy(max_grad_norm=None, weight_decay=0.0), "words": AdamW(max_grad_norm=None)})
    assert {n: type(o).__name__ for n, o in optimizers.raw.items()} == {"main": "Prodigy", "words": "AdamW"}
    theirs = Theirs([{"params": [plain.a], "weight_decay": 0.0}], lr=1.0, safeguard_warmup=True)
    reference = torch.optim.AdamW([plain.b], lr=0.2, weight_decay=1e-2)
    from shared.train.loop import generator

    for step in range(6):
        torch.manual_seed(generator(7, step, 0).initial_seed() % 2**31)
        (update,) = plain.updates(step, 0)
        theirs.zero_grad(), reference.zero_grad()
        update.loss.backward()
        theirs.step(), reference.step()
    assert torch.allclose(task.a, plain.a, rtol=1e-6) and torch.allclose(task.b, plain.b, rtol=1e-6)


def test_lbfgs_sees_the_same_noise_at_every_evaluation_in_a_step():
    task, looks = Bowl(), []
    original = task.updates

    def spy(step: int, micro: int):
        for update in original(step, micro):
            looks.append((step, torch.initial_seed()))
            yield update

    task.updates = spy  # type: ignore[method-assign]
    run(task, {"main": Lbfgs(max_iter=5)}, steps=2)
    assert len(looks) > 4 and len(set(looks)) == 2, "one seed per step, however often the loss is evaluated"


def test_training_continues_from_the_unaveraged_point_after_an_evaluation():
    optimizers = run(task := Bowl(), {"main": ScheduleFree()})
    going = task.state()[0]
    optimizers.average(True)
    assert not torch.equal(task.a, going)
    optimizers.average(False)
    assert torch.allclose(task.a, going, atol=1e-6)


def test_settings_are_read_per_group_and_invalid_settings_are_refused():
    train = validate(Train, {"optimizers": {"main": {"eps": 1e-6}, "words": {"kind": "prodigy", "d_coef": 2}}})
    assert train.optimizers == {"main": AdamW(eps=1e-6), "words": Prodigy(d_coef=2)}
    with pytest.raises(ValueError, match=r"optimizers\.main.*unknown kind 'adam'.*adamw"):
        validate(Train, {"optimizers": {"main": {"kind": "adam"}}})
    with pytest.raises(ValueError, match="lbfgs uses one rate"):
        weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        groups = [TrainableGroup(str(i), [w], lr=0.1 * (i + 1)) for i, w in enumerate(weights)]
        Optimizers({"main": groups}, {"main": Lbfgs()}, Accelerator(cpu=True))
    with pytest.raises(ValueError, match="adamw_8bit needs a GPU"):
        from shared.optimizers import AdamW8bit

        Optimizers(Bowl().groups(), {"main": AdamW8bit()}, Accelerator(cpu=True))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return paint(tmp_path_factory.mktemp("optimizers") / "photos")


TWO = ("phases=null", "trainable.tokens.group=words", "trainable.lora.rank=2", "trainable.tokens.lr=0.1")


@pytest.mark.parametrize("kind", ["prodigy", "schedule_free"])
def test_a_run_with_two_optimizers_resumes_bit_for_bit(tiny, photos, tmp_path, kind):
    settings = (*TWO, f"train.optimizers.words.kind={kind}", "train.steps=4", "train.checkpoint_every=1")
    recipe = small("pivotal_tuning", *settings, "train.validation.every=2", "sampling.steps=1", "regularize=null")
    whole = finish(session(tiny(), recipe, photos, tmp_path / "whole"))
    part = session(tiny(), recipe, photos, tmp_path / "part").steps()
    for _ in range(3):
        next(part)
    part.close()
    assert same(finish(session(tiny(), recipe, photos, tmp_path / "part"), resume=True), whole)


def test_settings_for_a_group_without_parts_are_an_error(tiny, photos, tmp_path):
    recipe = small("pivotal_tuning", *TWO, "train.optimizers.wrods.kind=prodigy")
    with pytest.raises(ValueError, match=r"train\.optimizers: unknown group 'wrods'. Did you mean 'words'"):
        session(tiny(), recipe, photos, tmp_path / "run")
