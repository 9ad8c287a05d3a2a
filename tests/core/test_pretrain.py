"""Tests what the pretraining driver saves, resumes, skips and refuses, using a tiny network."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from shared.config import validate
from shared.optimizers import AdamW
from shared.pretrain.run_task import RunSettings, refuse_older, run_task
from shared.pretrain.task import Compute, PretrainTask, decay_groups
from shared.train import checkpoint
from shared.train.averages import Averages
from shared.train.loop import generator
from shared.train.optim import NotFinite
from shared.train.task import Update
from tests.core.squares import same, train


class LayerTask(PretrainTask):
    """A task that trains an embedding, a linear layer and a layer norm on random ids."""

    batch_size = 4

    def __init__(self, seed: int = 0, bad: range = range(0), stop_at: int = -1) -> None:
        torch.manual_seed(0)
        self.seed, self.compute, self.bad, self.stop_at = seed, Compute(), bad, stop_at
        self.network = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.LayerNorm(3))
        self.modules = {"model": self.network}
        self.averages = Averages(dict(self.network.named_parameters()), 0.9)
        self.optimizers = {"main": AdamW(warmup=2, schedule="linear", decay=0.5)}
        self.facts = {"seed": seed}

    def groups(self):
        return {"main": decay_groups(self.network, 0.1, 0.2)}

    def updates(self, step: int, micro: int) -> Iterator[Update]:
        ids = torch.randint(5, (self.batch_size,), generator=generator(self.seed, step))
        loss = (self.network(ids) - 1).square().mean() * (math.nan if step in self.bad else 1)
        yield Update(loss)

    def after_step(self, step: int, pictures: int) -> None:
        if step == self.stop_at:
            signal.raise_signal(signal.SIGINT)

    def result(self) -> dict[str, float]:
        return {"measured": 2.0}


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_paused_run_equals_an_uninterrupted_run_even_if_learning_rates_decay(tmp_path: Path) -> None:
    whole, first, second = LayerTask(), LayerTask(), LayerTask()
    assert train(whole, tmp_path / "whole", 8).step == 8
    assert train(first, tmp_path / "halves", 8, pause_at=5).taken == 5
    outcome = train(second, tmp_path / "halves", 8)
    assert (outcome.step, outcome.pictures, outcome.taken) == (8, 32, 3)
    same(second.state_dict(), whole.state_dict())
    assert not torch.equal(whole.state_dict()["average/1.weight"], whole.state_dict()["model/1.weight"])
    a, b = (checkpoint.load(tmp_path / name) for name in ("whole", "halves"))
    assert a is not None and b is not None
    same(dict(a.optimizer), dict(b.optimizer))


def test_the_log_contains_mean_losses_learning_rates_and_measurements(tmp_path: Path) -> None:
    train(LayerTask(), tmp_path, 6)
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 6, 6] and rows[-1] == {"step": 6, "measured": 2.0}
    assert [round(row["lr/weights"], 4) for row in rows[:3]] == [0.0667, 0.1, 0.05]
    assert rows[1]["pictures"] == 16 and rows[1]["loss"] > 0


def test_ctrl_c_saves_the_last_completed_step(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(LayerTask(stop_at=3), tmp_path / "halves", 6)
    resumed, whole = LayerTask(), LayerTask()
    assert train(resumed, tmp_path / "halves", 6).taken == 3
    train(whole, tmp_path / "whole", 6)
    same(resumed.state_dict(), whole.state_dict())


def test_steps_without_a_finite_loss_are_skipped_but_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    task = LayerTask(bad=range(2, 4))
    with pytest.warns(UserWarning, match="the loss at step 3 is nan: the step is skipped"):
        assert train(task, tmp_path / "two", 5).step == 5
    assert all(bool(tensor.isfinite().all()) for tensor in task.state_dict().values())
    with pytest.warns(UserWarning), pytest.raises(NotFinite, match="like those of the 19 steps before"):
        train(LayerTask(bad=range(2, 100)), tmp_path / "many", 100)
    state = checkpoint.load(tmp_path / "many")
    assert state is not None and state.step == 2


def test_an_update_that_leaves_non_finite_parameters_is_not_saved(tmp_path: Path) -> None:
    class Spoiled(LayerTask):
        def after_step(self, step: int, pictures: int) -> None:
            if step == 4:
                with torch.no_grad():
                    self.network[1].weight.fill_(math.inf)  # type: ignore[operator]

    train(LayerTask(), tmp_path, 8, pause_at=2)
    with pytest.raises(NotFinite, match="the update at step 4 left parameters that are not finite"):
        train(Spoiled(), tmp_path, 8, pause_at=4)
    state = checkpoint.load(tmp_path)
    assert state is not None and state.step == 2


def test_a_log_that_pcs_did_not_write_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="contains files that pcs did not write"):
        train(LayerTask(bad=range(9)), tmp_path, 2)


def test_changed_settings_and_older_checkpoints_are_refused(tmp_path: Path) -> None:
    train(LayerTask(), tmp_path, 2)
    with pytest.raises(ValueError, match="was made with seed=0, not 1"):
        train(LayerTask(seed=1), tmp_path, 4)
    assert train(LayerTask(seed=1), tmp_path, 4, resume=False).taken == 4
    (tmp_path / "unet.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unet\.safetensors is a checkpoint from an earlier version"):
        refuse_older(tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="set steps, minutes or both"):
        RunSettings()


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_follows_the_setting_and_if_unset_is_used_only_if_the_processor_is_fast_at_it(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: fast, raising=False)
    found = [RunSettings(steps=1, device="cpu", bf16=asked).compute().bf16 for asked in (None, True, False)]
    assert found == [fast, True, False]


def test_a_time_limit_stops_a_run_with_or_without_a_step_limit(tmp_path: Path) -> None:
    for name, settings in (("a", RunSettings(minutes=1e-9)), ("b", RunSettings(steps=9, minutes=0.0, device="cpu"))):
        assert run_task(LayerTask(), settings, tmp_path / name).step < 9


def test_weight_decay_excludes_biases_norms_and_embeddings() -> None:
    decayed, others = decay_groups(LayerTask().network, 0.1, 0.2)
    assert [tuple(p.shape) for p in decayed.parameters] == [(3, 3)] and decayed.weight_decay == 0.2
    assert sorted(tuple(p.shape) for p in others.parameters) == [(3,), (3,), (3,), (5, 3)] and others.weight_decay == 0


def test_learning_rates_are_constant_until_they_decay_over_the_last_fraction_of_the_run() -> None:
    linear = AdamW(schedule="linear", decay=0.2, warmup=10)
    assert [round(linear.factor(50, done), 3) for done in (0.0, 0.8, 0.9, 1.0, 1.1)] == [1, 1, 0.5, 0, 0]
    assert linear.factor(0, -0.1) == pytest.approx(1 / 11)
    assert AdamW(schedule="cosine", decay=0.5).factor(0, 0.75) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="decay = 0.3 has no effect with a constant schedule"):
        validate(AdamW, {"decay": 0.3})
