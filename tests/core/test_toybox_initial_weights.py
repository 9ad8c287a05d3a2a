"""Tests that a run in a new folder starts from the shipped weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.pretrain.task import Compute
from shared.pretrain.toybox import assemble, models, run_folder, stages, unet
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox.initial_weights import adopt_backbone, adopt_vae, adopted_steps
from shared.toybox import weights
from shared.train import checkpoint
from shared.train.budget import Budget
from tests.core.squares import same

BACKBONE = weights.WEIGHTS / "backbone"
WORK = stages.Work(Path("work"), 64, None, "cpu", 1, 0, more=3200, pace=stages.Pace(lr=5e-4))


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_the_shipped_autoencoder_is_used_unless_a_run_trains_its_own(tmp_path: Path) -> None:
    shipped = run_folder.frozen_vae(BACKBONE).float()
    assert adopt_vae(tmp_path / "a") and adopt_vae(tmp_path / "a")
    same(run_folder.frozen_vae(tmp_path / "a").state_dict(), shipped.state_dict())
    own = run_folder.training_folder(tmp_path / "b", "vae")
    checkpoint.save(own, checkpoint.State(0, 1, {"a": torch.zeros(1)}, info={}))
    assert not adopt_vae(tmp_path / "b") and not run_folder.has_vae(tmp_path / "b")


def test_a_new_folder_inherits_the_training_facts_of_the_shipped_weights(tmp_path: Path) -> None:
    assert adopt_backbone(tmp_path) and not adopt_backbone(tmp_path)
    shipped = json.loads((BACKBONE / "training.json").read_text())
    assert assemble.training_facts(tmp_path) == shipped and set(shipped["last"]) == {"vae", "decoder", "unet"}


def test_a_run_in_a_new_folder_starts_from_the_shipped_unet(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    assert adopt_backbone(tmp_path)
    state = checkpoint.load(run_folder.training_folder(tmp_path, "unet"))
    assert state is not None and state.step == adopted_steps() > 0
    spend, settings = stages.unet_training(WORK)
    empty: Any = cache.Cache(*[torch.zeros(0)] * 4)  # pyright: ignore[reportArgumentType]
    task = unet.UnetTask(settings, empty, tmp_path, spend.budget(), Compute())
    assert state.info["facts"]["sizes"] == as_json(task.facts["sizes"])
    task.load_state_dict(state.learned)
    shipped: Any = UNet2DConditionModel.from_pretrained(str(BACKBONE / "unet"), torch_dtype=torch.float32)
    same(task.denoiser.unet.state_dict(), shipped.state_dict())


def test_incompatible_weights_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers_per_block=2.* requires .*layers_per_block=1.*--fresh"):
        adopt_backbone(tmp_path / "run", models.UnetSize(layers_per_block=1))
    assert list(tmp_path.iterdir()) == []
    folder = tmp_path / run_folder.VAE_FOLDER
    models.build_vae(models.VaeSize((8, 8, 8), groups=4, latent_channels=4)).save_pretrained(str(folder))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"reads 8 latent channels, .* {folder} has 4; .*--fresh"):
        adopt_backbone(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_round_of_additional_training_ends_at_a_learning_rate_of_zero() -> None:
    first = adopted_steps()
    for minutes in (None, 5.0):  # the time limit pauses the round without affecting its learning rates
        spend, settings = stages.unet_training(replace(WORK, minutes=minutes))
        assert (spend.steps, spend.minutes, settings.lr) == (first + 100, minutes, 5e-4)
        budget, optimizer = Budget(steps=spend.steps), settings.optimizer

        def factor(step: int, budget: Budget = budget, optimizer: Any = optimizer) -> float:
            return optimizer.factor(first + step, budget.spent(first + step, optimizer.warmup))

        found = [factor(step) for step in (0, 25, 50, 100)]
        assert found == pytest.approx([1, 1, 2 / 3, 0], abs=0.01)
    assert stages.unet_training(replace(WORK, more=None))[0].steps == stages.UNET_STEPS
