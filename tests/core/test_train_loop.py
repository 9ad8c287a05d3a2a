"""Tests the training loop, checkpoints and logs, and what an interruption leaves behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from shared.io.temporary_names import beside
from shared.optimizers.adamw import AdamW
from shared.train import checkpoint
from shared.train.budget import Budget
from shared.train.last_good_state import LastGood
from shared.train.log import Log
from shared.train.loop import Loop
from shared.train.optim import NotFinite, Optimizers
from shared.train.task import Regrouped, Update
from shared.trainable import TrainableGroup

# --- the loop --------------------------------------------------------------------------------


class Line:
    """A task that fits a linear function to points given in one batch or in several smaller ones."""

    def __init__(self, pieces: int) -> None:
        # float64, because Adam divides gradients by their magnitude and so amplifies rounding errors in the sums
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))
        x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x @ torch.tensor([1.0, 2.0], dtype=torch.float64)
        self.pieces = list(zip(x.chunk(pieces), y.chunk(pieces), strict=True))
        self.bad = -1

    def updates(self, step, micro):
        x, y = self.pieces[micro]
        loss = ((x @ self.weight - y) ** 2).mean()
        if step == self.bad:
            loss = loss * math.nan
        yield Update(loss, parts={"line": loss.detach()})


def trained(task, pieces: int, steps: int = 5, start: int = 0, **settings):
    group = TrainableGroup("line", [task.weight], lr=0.1)
    accelerator = Accelerator(cpu=True)
    optimizers = Optimizers({"main": [group]}, {"main": AdamW(**settings)}, accelerator)
    loop = Loop(task, optimizers, Budget(steps=steps), 0, accelerator, pieces)
    return list(loop.run(start)), optimizers


@pytest.mark.parametrize("clip", [None, 0.01])
def test_accumulated_gradients_equal_the_gradient_of_a_larger_batch(clip):
    whole, parts = Line(1), Line(4)
    one, _ = trained(whole, 1, max_grad_norm=clip)
    four, _ = trained(parts, 4, max_grad_norm=clip)
    assert torch.allclose(whole.weight, parts.weight, rtol=1e-5)
    for a, b in zip(one, four, strict=True):
        assert a.step == b.step and a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5) and a.parts == pytest.approx(b.parts, rel=1e-5)


def test_a_non_finite_loss_leaves_the_parameters_unchanged():
    good, bad = Line(1), Line(1)
    bad.bad = 3
    trained(good, 1, steps=3)
    with pytest.raises(NotFinite, match="the loss at step 4 is nan"):
        trained(bad, 1)
    assert torch.equal(bad.weight, good.weight) and bad.weight.grad is None


def test_a_non_finite_gradient_leaves_the_parameters_unchanged():
    class Root(Line):
        def updates(self, step, micro):
            yield Update((self.weight * 0).sum().sqrt())  # the loss is 0, but its gradient is not finite

    task = Root(1)
    before = task.weight.detach().clone()
    with pytest.raises(NotFinite, match="the gradient at step 1 is not finite"):
        trained(task, 1)
    assert torch.equal(task.weight, before) and task.weight.grad is None


def factors(kind: str, steps: int, warmup: int = 0) -> list[float]:
    settings, budget = AdamW(schedule=kind, warmup=warmup), Budget(steps=steps)
    return [settings.factor(s, budget.spent(s, warmup)) for s in range(steps)]


def test_learning_rate_schedules_match_their_formulas():
    assert factors("constant", 5, 3) == [0.25, 0.5, 0.75, 1, 1]
    assert factors("linear", 4) == [1, 0.75, 0.5, 0.25]
    assert factors("cosine", 4) == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(4)])
    records, _ = trained(Line(1), 1, steps=4, schedule="linear")
    assert [r.lr["line"] for r in records] == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_the_optimizer_state_survives_a_round_trip_and_an_incompatible_state_is_refused():
    task = Line(1)
    _, optimizers = trained(task, 1, steps=2)
    state = optimizers.state_dict()
    assert set(state) == {"main.0.exp_avg", "main.0.exp_avg_sq", "main.0.step"}
    _, other = trained(Line(1), 1, steps=0)
    other.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    with pytest.raises(ValueError, match="does not match this recipe"):
        other.load_state_dict({**state, "main.0.exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match="does not match this recipe"):
        other.load_state_dict({k.replace("main.0", "main.5"): v for k, v in state.items()})


# --- checkpoints and logs --------------------------------------------------------------------


def a_state(step: int = 3, phase: int = 1) -> checkpoint.State:
    tensors = {"a": torch.randn(2, generator=torch.Generator().manual_seed(step))}
    return checkpoint.State(phase, step, tensors, {"main.0.step": torch.ones(())}, tensors, {"recipe": {"seed": 1}})


def test_a_checkpoint_survives_a_round_trip_and_replaces_the_older_one(tmp_path):
    assert checkpoint.load(tmp_path / "none") is None
    for step in (3, 12):
        checkpoint.save(tmp_path, a_state(step))
    checkpoint.save(tmp_path, a_state(0, phase=2))
    assert len(list(tmp_path.iterdir())) == 1
    state = checkpoint.load(tmp_path)
    assert state is not None and (state.phase, state.step, state.info["recipe"]) == (2, 0, {"seed": 1})
    for name in ("learned", "best"):
        assert torch.equal(getattr(state, name)["a"], a_state(0).learned["a"])
    assert state.optimizer["main.0.step"].shape == ()


def test_a_checkpoint_always_exists_while_a_step_is_saved_again(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, a_state())
    seen = []
    rename = checkpoint.os.rename
    monkeypatch.setattr(checkpoint.os, "rename", lambda *a: (seen.append(checkpoint.load(tmp_path)), rename(*a)))
    checkpoint.save(tmp_path, a_state())
    assert seen[0] is not None and checkpoint.load(tmp_path) is not None and len(list(tmp_path.iterdir())) == 1


def test_leftovers_from_a_killed_run_are_ignored_and_removed(tmp_path):
    checkpoint.save(tmp_path, a_state(3))
    half = beside(tmp_path / "checkpoint-01-0000004")
    half = half.with_name(half.name.replace(f"-{os.getpid()}-", "-999999999-"))
    half.mkdir()
    (half / "learned.safetensors").write_bytes(b"half")
    state = checkpoint.load(tmp_path)
    assert state is not None and state.step == 3
    checkpoint.save(tmp_path, a_state(5))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-01-0000005"]


@pytest.mark.parametrize(
    "harm",
    [
        lambda f: (f / "learned.safetensors").write_bytes((f / "learned.safetensors").read_bytes()[:-3]),
        lambda f: (f / "optimizer.safetensors").unlink(),
        lambda f: (f / "learned.safetensors").write_bytes(b"\xff" * 40),
        lambda f: (f / "state.json").write_text('{"phase": 0, "st'),
        lambda f: (f / "state.json").write_text("[]"),
        lambda f: (f / "state.json").write_text("{}"),
        lambda f: (f / "state.json").unlink(),
    ],
)
def test_a_damaged_checkpoint_is_reported(tmp_path, harm):
    harm(checkpoint.save(tmp_path, a_state()))
    with pytest.raises(ValueError, match=r"checkpoint-01-0000003 is damaged \(.+\); delete it to start over"):
        checkpoint.load(tmp_path)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_log_drops_repeated_steps_and_a_partial_line(tmp_path):
    log = Log(tmp_path / "run", tensorboard=False)
    assert not (tmp_path / "run").exists(), "nothing is created before there is something to write"
    for step in range(1, 6):
        log.scalars(step, {"loss": step / 2})
    log.close()
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = Log(tmp_path / "run", start=3, tensorboard=False)
    log.scalars(4, {"loss": 9.0})
    log.close()
    assert [(row["step"], row["loss"]) for row in lines(tmp_path / "run")] == [(1, 0.5), (2, 1), (3, 1.5), (4, 9)]
    log = Log(tmp_path / "run", tensorboard=False)
    log.scalars(1, {"loss": 0.0})
    log.close()
    assert len(lines(tmp_path / "run")) == 1, "a run that starts over replaces the log"


def test_tensorboard_events_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path)
    log.scalars(1, {"loss": 0.5})
    log.scalars(2, {"loss": 0.25})
    log.picture(2, "sample", torch.rand(3, 8, 8))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert len(events.Images("sample")) == 1


# --- parameters that change -------------------------------------------------------------------


def test_parameters_may_change_between_steps_and_kept_parameters_keep_their_moments():
    class Splits(Line):
        """A task whose weight is the sum of two parameters. The second is trained after step 3, in its own group."""

        def __init__(self) -> None:
            super().__init__(1)
            self.first, self.more = self.weight, nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def groups(self, split: bool):
            first = {"main": [TrainableGroup("line", [self.first], lr=0.1)]}
            return {**first, "more": [TrainableGroup("more", [self.more], lr=0.01)]} if split else first

        def updates(self, step, micro):
            x, y = self.pieces[micro]
            yield Update(((x @ (self.first + self.more) - y) ** 2).mean())

    task, plain = Splits(), Line(1)
    accelerator = Accelerator(cpu=True)
    optimizers = Optimizers(task.groups(False), {"main": AdamW()}, accelerator)
    good = LastGood(optimizers)
    regroup = lambda step: Regrouped(task.groups(True)) if step == 3 else None  # noqa: E731
    loop = Loop(task, optimizers, Budget(steps=5), 0, accelerator, good=good, regroup=regroup)
    records = []
    for record in loop.run():
        records.append(record)
        if record.step == 3:
            at_three = task.first.detach().clone()
    trained(plain, 1, steps=3)
    assert torch.equal(at_three, plain.weight), "training is unaffected up to step 3"
    moments = optimizers.state_dict()
    assert float(moments["main.0.step"]) == 5 and float(moments["more.0.step"]) == 2
    assert [set(r.lr) for r in records] == [{"line"}] * 3 + [{"line", "more"}] * 2 and task.more.abs().sum() > 0
    assert good.put_back() == 4 and torch.equal(task.more, good._kept[1][0]), (
        "the last good state contains all parameters"
    )


def test_kept_rows_keep_their_moments_and_new_rows_start_from_zero():
    """When Gaussians are split, each kept row must learn exactly what it would have learned without the other rows."""

    def steps(optimizers: Optimizers, parameter: nn.Parameter, pulls: torch.Tensor) -> None:
        for step, pull in enumerate(pulls):
            optimizers.set_step(step, Budget(steps=10))
            optimizers.backward((parameter * pull).sum(), None, accelerator)
            optimizers.step("main", accelerator, step)

    def groups(parameter: nn.Parameter) -> dict[str, list[TrainableGroup]]:
        return {"main": [TrainableGroup("rows", [parameter], lr=0.1)]}

    accelerator, draw = Accelerator(cpu=True), torch.Generator().manual_seed(0)
    early, late = torch.randn(3, 4, 2, generator=draw), torch.randn(3, 5, 2, generator=draw)
    first = nn.Parameter(torch.zeros(4, 2))
    optimizers = Optimizers(groups(first), {"main": AdamW(max_grad_norm=None)}, accelerator)
    steps(optimizers, first, early)
    rows = torch.tensor([2, 0, -1, 3, -1])
    second = nn.Parameter(first.detach()[rows.clamp_min(0)] * (rows >= 0)[:, None])
    optimizers.regroup(groups(second), accelerator, {second: (first, rows)})
    steps(optimizers, second, late)

    alone = nn.Parameter(torch.zeros(3, 2))
    reference = Optimizers(groups(alone), {"main": AdamW(max_grad_norm=None)}, accelerator)
    kept = rows >= 0
    steps(reference, alone, torch.cat([early[:, rows[kept]], late[:, kept]]))
    assert torch.equal(second[kept], alone)
    state = optimizers.raw["main"].state[second]
    assert float(state["step"]) == 6 and state["exp_avg"].shape == second.shape
    expected = torch.zeros(2)
    for pull in late[:, 2]:
        expected = 0.9 * expected + 0.1 * pull
    assert torch.allclose(state["exp_avg"][2], expected)
