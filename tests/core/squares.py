"""Pictures small enough for the toybox's networks to train on within seconds, and helpers for such training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.pretrain.run_task import Outcome, RunSettings, run_task
from shared.pretrain.task import Compute, PretrainTask
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import models, run_folder, vae
from shared.toybox import tokenizer as words

COLORS = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
TINY_SIZE = models.VaeSize((8, 8, 8), groups=4, sample_size=16, latent_channels=4)
TINY_UNET_SIZE = models.UnetSize((8, 16, 16), 1, heads=2, groups=4, sample_size=4, latent_channels=4)
TINY_VAE = vae.VaeTraining(TINY_SIZE, batch=4)


class Squares:
    """16×16 pictures of a coloured square, with two captions each."""

    def __init__(self, n: int) -> None:
        rng, names = np.random.default_rng(0), list(COLORS)
        self._pixels = np.full((n, 16, 16, 3), 230, np.uint8)
        self.captions: list[list[str]] = []
        for i in range(n):
            name, (y, x) = names[i % 3], rng.integers(0, 8, 2)
            self._pixels[i, y : y + 8, x : x + 8] = COLORS[name]
            self.captions.append([f"a {name} cat", f"a photo of a {name} cat"])

    def __len__(self) -> int:
        return len(self._pixels)

    def pixels(self, index: Any) -> np.ndarray:
        return self._pixels[index]

    def masks(self, index: Any) -> np.ndarray:
        return (self._pixels[index] != 230).any(-1)


def train(task: PretrainTask, folder: Path, steps: int, resume: bool = True, pause_at: int | None = None) -> Outcome:
    """Trains on the CPU in fp32 until step `steps`, or only until step `pause_at` if that is given."""
    return run_task(task, RunSettings(steps, pause_at=pause_at, resume=resume, device="cpu", log_every=2), folder)


def tiny_run(out: Path, data: Squares) -> cache.Cache:
    """Writes a small tokenizer and a briefly trained autoencoder to `out`. Returns the latents of `data`."""
    words.save(words.build(["a", "photo", "of", "cat", *COLORS, "sks"]), out / run_folder.TOKENIZER_FOLDER)
    train(vae.VaeTask(TINY_VAE, data, out, Compute()), run_folder.training_folder(out, "vae"), 3)
    return cache.build(out / "latents", data, run_folder.frozen_vae(out), run_folder.tokenizer_of(out))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Asserts that two state dicts are equal bit for bit."""
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
