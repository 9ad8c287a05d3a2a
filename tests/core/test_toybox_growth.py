"""A U-Net that grows: it computes what it did, all that is new learns, and the stages begin with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import models, run_folder, stages, unet
from shared.pretrain.toybox.grow_unet import grow
from shared.pretrain.toybox.initial_weights import adopt_backbone, adopted_steps
from shared.toybox import weights
from shared.train import checkpoint
from shared.train.budget import Budget

TINY = models.UnetSize((8, 16, 16), heads=2, groups=4, sample_size=8)
LARGER = {
    "deep": replace(TINY, layers_per_block=3),
    "channels": replace(TINY, latent_channels=6),
    "both": replace(TINY, layers_per_block=2, latent_channels=7),
}


def shipped() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(str(weights.WEIGHTS / "backbone" / "unet")).float().eval()


def noisy(channels: int, side: int, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, c = torch.randn(3, channels, side, side, generator=g), torch.randn(3, 7, context, generator=g)
    return x, torch.tensor([1, 500, 999]), c


@torch.no_grad()
@pytest.mark.parametrize("channels", [4, 8])
def test_the_shipped_unet_grows_without_a_change(channels: int) -> None:
    net = shipped()
    grown = grow(net, replace(models.DEEP, latent_channels=channels))
    x, t, c = noisy(channels, 16, 128)
    found, expected = grown(x, t, c).sample, net(x[:, :4], t, c).sample
    torch.testing.assert_close(found[:, :4], expected, atol=1e-5, rtol=0)
    assert found.shape == x.shape and not found[:, 4:].any(), "v of what nothing is known of"
    assert sum(p.numel() for p in grown.parameters()) > sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", list(LARGER))
def test_what_is_new_learns(name: str) -> None:
    torch.manual_seed(0)
    net, size = models.build_unet(16, TINY), LARGER[name]
    grown: Any = grow(net, size)
    x, t, c = noisy(size.latent_channels, 8, 16)
    with torch.no_grad():
        torch.testing.assert_close(grown(x, t, c).sample[:, :4], net(x[:, :4], t, c).sample, atol=1e-5, rtol=0)
    before = {n: p.detach().clone() for n, p in grown.named_parameters()}
    optimizer = torch.optim.Adam(grown.parameters(), 1e-3)
    for _ in range(3):  # a layer before one of zeros has its first gradient in the second step
        optimizer.zero_grad()
        (grown(x, t, c).sample - x).square().mean().backward()
        optimizer.step()
    assert [n for n, p in grown.named_parameters() if torch.equal(p, before[n])] == []


def test_growing_twice_equals_growing_once_and_shrinking_is_refused() -> None:
    torch.manual_seed(0)
    net = models.build_unet(16, TINY)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    once = grow(grow(net, replace(TINY, layers_per_block=2)), replace(TINY, layers_per_block=3))
    x, t, c = noisy(4, 8, 16)
    with torch.no_grad():
        torch.testing.assert_close(once(x, t, c).sample, net(x, t, c).sample, atol=1e-4, rtol=1e-5)
    for size, complaint in (
        (TINY, "only grow, not shrink"),
        (replace(TINY, channels=(16, 16, 16), layers_per_block=3), "block_out_channels"),
        (replace(TINY, groups=8, layers_per_block=3), "norm_num_groups"),
        (replace(TINY, heads=4, layers_per_block=3), "attention_head_dim"),
    ):
        with pytest.raises(ValueError, match=complaint):
            grow(once, size)


def test_a_deep_run_begins_with_the_shipped_weights(tmp_path: Path) -> None:
    assert adopt_backbone(tmp_path, models.DEEP)
    state = checkpoint.load(run_folder.training_folder(tmp_path, "unet"))
    assert state is not None and state.step == adopted_steps() > 0
    spend, settings = stages.unet_training(stages.Work(tmp_path, 64, None, "cpu", 1, 0, unet=DEEP_CHOICE))
    ids = cache.tokenize(run_folder.tokenizer_of(tmp_path), [["a photo of a red cat"]])[:, 0]
    empty: Any = cache.Cache(*[torch.zeros(0)] * 4)  # pyright: ignore[reportArgumentType]
    task = unet.UnetTask(settings, empty, tmp_path, spend.budget(), unet.Compute())
    assert state.info["facts"]["sizes"] == json.loads(json.dumps(task.facts["sizes"]))
    task.load_state_dict(state.learned)
    x, t, _ = noisy(4, 16, 128)
    with torch.no_grad():
        context = task.denoiser.text_encoder(input_ids=torch.from_numpy(ids).long()).last_hidden_state.expand(3, -1, -1)
        expected = shipped()(x, t, context).sample
        found = task.denoiser(x, t, torch.from_numpy(ids).long().expand(3, -1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


DEEP_CHOICE = stages.UnetChoices(deep=True, more=3200)


def test_a_round_of_more_pictures_ends_with_a_rate_of_zero() -> None:
    first = adopted_steps()
    work = stages.Work(Path("work"), 64, None, "cpu", 1, 0, unet=DEEP_CHOICE, pace=stages.Pace(lr=5e-4))
    for minutes in (None, 5.0):  # minutes pause the round, and its rates do not know of it
        spend, settings = stages.unet_training(replace(work, minutes=minutes))
        assert (spend.steps, spend.minutes, settings.lr) == (first + 100, minutes, 5e-4)
        budget, optimizer = Budget(steps=spend.steps), settings.optimizer

        def factor(step: int, budget: Budget = budget, optimizer: Any = optimizer) -> float:
            return optimizer.factor(first + step, budget.spent(first + step, optimizer.warmup))

        found = [factor(step) for step in (0, 25, 50, 100)]
        assert found == pytest.approx([1, 1, 2 / 3, 0], abs=0.01)
    plain = stages.unet_training(replace(work, unet=stages.UnetChoices()))
    assert plain[0].steps == stages.UNET_STEPS and plain[1].unet == models.UnetSize()
