"""Tests the reader of noisy latents, whose loss teaches the toybox's denoiser the attributes that captions name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shared.optimizers import AdamW
from shared.pretrain.run_task import RunSettings
from shared.pretrain.task import Compute
from shared.pretrain.toybox import denoising_loss as denoising
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import latent_reader as reader
from shared.pretrain.toybox import models, run_folder, unet
from shared.toybox import captions
from shared.toybox import tokenizer as words
from shared.train.budget import Budget
from tests.core.squares import same, train

TINY = denoising.UnetTraining(
    models.UnetSize((8, 16, 16), 1, heads=2, groups=4, sample_size=8, latent_channels=4),
    models.TextSize(hidden=16, layers=1, heads=2),
    batch=8,
)
CPU = RunSettings(steps=1, device="cpu")


@pytest.fixture
def cached() -> cache.Cache:
    """Returns a cache of latents with two captions each. One names the class and the view, the other only the class.

    The first channel of the latents encodes the class, and the second channel encodes the view.
    """
    rng, texts = np.random.default_rng(0), []
    latents = rng.normal(0, 0.3, (64, 4, 8, 8)).astype(np.float16)
    for i in range(64):
        kind, view = i % 2, i // 2 % 2
        latents[i, 0] += 3 * kind - 1.5
        latents[i, 1] += 3 * view - 1.5
        text = f"a red {captions.CLASSES[kind]}"
        texts.append([f"{text}, {captions.SEEN[captions.VIEWS[view]][0]}", text])
    ids = cache.tokenize(words.build(), texts)
    attributes = np.array([[captions.caption_attributes(text) for text in both] for both in texts], np.int8)
    return cache.Cache(latents, ids, np.full((64, 8, 8), 255, np.uint8), attributes)


def test_the_loss_is_the_cross_entropy_of_the_named_attributes() -> None:
    torch.manual_seed(0)
    reads, bars = reader.Reader(4), models.alphas_bar()
    clean, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 300, 599])
    attributes = torch.tensor([[2, -1, 0], [5, 3, -1], [-1, -1, -1]])
    noisy = models.build_scheduler().add_noise(clean, noise, t)  # pyright: ignore[reportArgumentType]
    logits = reads(noisy)
    expected = sum(
        -(k + 1) * logits[k][i].double().log_softmax(0)[attributes[i, k]]
        for i in range(3)
        for k in range(3)
        if attributes[i, k] >= 0
    )
    found = reads.loss(clean, attributes, noise, t, bars, (1, 2, 3))
    torch.testing.assert_close(found.double(), torch.as_tensor(expected) / 3, atol=1e-5, rtol=1e-5)
    assert float(reads.loss(clean, torch.full_like(attributes, -1), noise, t, bars).detach()) == 0


def _read(cached: cache.Cache, out: Path, steps: int) -> reader.Reader:
    return reader.train_reader(cached, out, CPU, reader.ReaderTraining(steps=steps))


def test_the_reader_learns_to_read_attributes_and_is_saved(cached: cache.Cache, tmp_path: Path) -> None:
    reads = _read(cached, tmp_path, 60)
    clean = torch.from_numpy(cached.latents.astype(np.float32))
    attributes = torch.from_numpy(cached.caption_attributes[:, 0].astype(np.int64))
    with torch.no_grad():
        kind, view, _ = reads(clean)
    assert (kind.argmax(1) == attributes[:, 0]).all() and (view.argmax(1) == attributes[:, 1]).float().mean() > 0.9
    log = run_folder.log_of(tmp_path, "reader").read_text()
    again = _read(cached, tmp_path, 60)
    same(again.state_dict(), reads.state_dict())
    assert run_folder.log_of(tmp_path, "reader").read_text() == log, "a finished reader is not trained again"
    assert not any(p.requires_grad for p in again.parameters())


def test_soften_blurs_about_half_of_the_latents_and_preserves_their_mean() -> None:
    flat = torch.full((8, 4, 8, 8), 0.7)
    torch.testing.assert_close(reader.soften(flat, torch.Generator().manual_seed(0)), flat)
    x = torch.randn(64, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    soft = reader.soften(x, torch.Generator().manual_seed(0))
    same = (soft - x).abs().amax((1, 2, 3)) < 1e-6
    assert 16 < int(same.sum()) < 48
    assert float(soft[~same].std()) < 0.8 * float(x.std())
    one = torch.zeros(1, 4, 9, 9)
    one[0, 2, 4, 4] = 1
    spread = next(
        s for s in (reader.soften(one, torch.Generator().manual_seed(i)) for i in range(9)) if s[0, 2, 4, 4] < 0.9
    )
    assert float(spread[0, 2].sum()) == pytest.approx(1, abs=1e-5) and not spread[0, [0, 1, 3]].any()


def test_dropped_captions_name_no_attributes(cached: cache.Cache) -> None:
    empty = torch.full((32,), 7)
    inputs = denoising.draw_batch(cached, empty, replace(TINY, batch=64, caption_dropout=0.5), 0)
    dropped = (inputs.ids == 7).all(1)
    assert 16 < int(dropped.sum()) < 48
    assert (inputs.caption_attributes[dropped] == -1).all() and (inputs.caption_attributes[~dropped][:, 0] >= 0).all()
    assert int(inputs.level.max()) < 600


def test_the_reading_loss_ends_once_the_learning_rate_is_low_enough(cached: cache.Cache, tmp_path: Path) -> None:
    words.save(words.build(), tmp_path / run_folder.TOKENIZER_FOLDER)
    reads = _read(cached, tmp_path, 30)
    falling = AdamW(schedule="linear", decay=0.5)
    settings = replace(TINY, reading=(1.0, 1.0, 1.0), optimizer=falling)

    def gradient(step: int, reads: reader.Reader | None) -> torch.Tensor:
        task = unet.UnetTask(settings, cached, tmp_path, Budget(steps=100), Compute(), reads=reads)
        (update,) = task.updates(step, 0)
        update.loss.backward()
        return torch.cat([p.grad.flatten() for p in task.denoiser.parameters() if p.grad is not None])

    until = 100 - int(50 * TINY.read_until)
    assert not torch.equal(gradient(0, reads), gradient(0, None))
    assert not torch.equal(gradient(until - 2, reads), gradient(until - 2, None))
    assert torch.equal(gradient(until, reads), gradient(until, None))
    task = unet.UnetTask(settings, cached, tmp_path, Budget(steps=100), Compute(), reads=reads)
    assert [round(task.reading(s), 3) for s in (0, 50, 75)] == [1, 1, round(0.2 / 0.7, 3)]


def test_the_probe_learns_to_read_the_middle_block_and_resumes_bit_for_bit(cached: cache.Cache, tmp_path: Path) -> None:
    words.save(words.build(), tmp_path / run_folder.TOKENIZER_FOLDER)
    settings = replace(TINY, reading=(0.0,) * 3, probing=(1.0, 1.0, 0.0), lr=3e-3, optimizer=AdamW(betas=(0.9, 0.99)))
    reads = reader.Reader(4).eval().requires_grad_(False)

    def run(name: str, steps: int) -> unet.UnetTask:
        task = unet.UnetTask(settings, cached, tmp_path, Budget(steps=steps), Compute(), 2, reads)
        train(task, tmp_path / name, steps)
        return task

    run("a", 2)
    stopped, straight = run("a", 4), run("b", 4)
    same(stopped.state_dict(), straight.state_dict())
    inputs = denoising.draw_batch(cached, stopped.empty, replace(settings, caption_dropout=0.0, batch=64), 10**6)

    def unread(run: unet.UnetTask) -> float:
        assert run.probe is not None
        with torch.no_grad():
            run.denoiser(inputs.latents, torch.full((64,), 1), inputs.ids)
            return float(run.probe.loss(inputs.caption_attributes, (1.0, 0.0, 0.0)))

    before = unread(stopped)
    assert unread(run("b", 60)) < 0.5 * before


def test_a_readable_prediction_has_a_lower_loss(cached: cache.Cache, tmp_path: Path) -> None:
    bars = models.alphas_bar()
    reads = _read(cached, tmp_path, 60)
    settings = replace(TINY, reading=(1.0, 1.0, 1.0), caption_dropout=0.0, batch=32)
    inputs = denoising.draw_batch(cached, torch.zeros(32, dtype=torch.long), settings, 0)
    bar = bars[inputs.t].view(-1, 1, 1, 1)

    def knows(x: torch.Tensor) -> torch.nn.Module:  # returns a denoiser whose v prediction implies the clean latents x
        def v(noisy: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return (bar.sqrt() * noisy - x) / (1 - bar).sqrt()

        return v  # pyright: ignore[reportReturnType]

    def extra(x: torch.Tensor) -> float:
        costs = [denoising.v_loss(knows(x), inputs, bars, settings, reads, None, weight) for weight in (0.0, 1.0)]
        return float(costs[1] - costs[0])

    right, swapped = inputs.latents, inputs.latents * torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(1, 4, 1, 1)
    assert extra(right) < 0.3 * extra(swapped)
    assert F.mse_loss(right, swapped) > 1
