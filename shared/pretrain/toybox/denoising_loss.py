"""Draws the denoiser's training batches and computes its loss. This is the v-prediction loss on cached latents, plus
two losses that measure how well a caption's attributes can be read from the predicted latents and from the middle of
the U-Net.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.optimizers import AdamW
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import latent_reader as reader
from shared.pretrain.toybox import models
from shared.train.loop import generator

_ADAMW = AdamW(betas=(0.9, 0.99), weight_decay=1e-2, warmup=200)


@dataclass(frozen=True)
class UnetTraining:
    """Settings for training the denoiser.

    lr: the peak learning rate
    t_uniform, t_mean: see `draw_times`
    thing_weight: the loss weight of things relative to the background. Things cover only a fifth of a picture but are
        hard to learn.
    reading: the weights of the losses for reading the class, view and accessory from the predicted x0
        (`reader.Reader`), at the peak learning rate
    probing: the corresponding weights for reading from the middle of the U-Net (`reader.Probe`)
    read_until: the weights in `reading` and `probing` fall with the learning rate, and reach 0 when the rate is
        `read_until` times the peak rate
    """

    unet: models.UnetSize = field(default_factory=models.UnetSize)
    text: models.TextSize = field(default_factory=models.TextSize)
    batch: int = 32
    lr: float = 8e-4
    optimizer: AdamW = _ADAMW
    caption_dropout: float = 0.1
    t_uniform: float = 0.1
    t_mean: float = 0.4
    thing_weight: float = 3.0
    reading: tuple[float, float, float] = (0.01, 0.04, 0.05)
    probing: tuple[float, float, float] = (0.05, 0.1, 0.08)
    read_until: float = 0.3
    ema: float = 0.999
    seed: int = 0
    snapshot_steps: int = 1500

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes of the text model and the U-Net, in the form that `models.build_denoiser` takes."""
        return {"text": asdict(self.text), "unet": asdict(self.unet)}


@dataclass(frozen=True)
class DenoisingBatch:
    """One step's random inputs, on the training device."""

    latents: Tensor  # [B, C, H, W], scaled
    ids: Tensor  # [B, L] token ids of the captions; a dropped caption is replaced with the empty caption
    noise: Tensor  # [B, C, H, W]
    t: Tensor  # [B] in [0, 1000), stratified over the batch
    weight: Tensor  # [B, H, W] loss weights, 1 on average
    caption_attributes: Tensor  # [B, 3] from `captions.caption_attributes`; -1 marks an attribute that is not named
    again: Tensor  # [B, C, H, W] noise that is added to the predicted x0 before attributes are read from it
    level: Tensor  # [B] the level of that noise, as a timestep

    def to(self, device: torch.device) -> DenoisingBatch:
        """Returns the batch, moved to ``device``."""
        return self._of(lambda x: x.to(device))

    def split(self, count: int) -> list[DenoisingBatch]:
        """Splits the batch into ``count`` equal shares. Each share takes every ``count``-th row, so that it covers the
        full range of t."""
        return [self._of(lambda x, i=i: x[i::count]) for i in range(count)]

    def _of(self, change: Callable[[Tensor], Tensor]) -> DenoisingBatch:
        return DenoisingBatch(*(change(getattr(self, field.name)) for field in fields(self)))


def draw_batch(data: cache.Cache, empty: Tensor, settings: UnetTraining, step: int) -> DenoisingBatch:
    """Draws the batch of a step. The batch depends only on the settings, the step and the cache's contents."""
    g, b = generator(settings.seed, step), settings.batch
    index = torch.randint(len(data), (b,), generator=g).numpy()
    variant = torch.randint(data.tokens.shape[1], (b,), generator=g).numpy()
    latents = torch.from_numpy(np.asarray(data.latents[index], dtype=np.float32))
    ids = torch.from_numpy(data.tokens[index, variant].astype(np.int64))
    dropped = torch.rand(b, generator=g) < settings.caption_dropout
    ids = torch.where(dropped[:, None], empty[None], ids)
    noise = torch.randn(latents.shape, generator=g)
    weight = 1 + (settings.thing_weight - 1) * torch.from_numpy(data.covered[index].astype(np.float32)) / 255
    times = draw_times(b, settings.t_uniform, settings.t_mean, g)
    named = torch.from_numpy(data.caption_attributes[index, variant].astype(np.int64)).masked_fill(dropped[:, None], -1)
    return DenoisingBatch(latents, ids, noise, times, weight / weight.mean(), named, *reader.draw_noise(latents, g))


def draw_times(count: int, uniform: float, mean: float, generator: torch.Generator) -> Tensor:
    """Draws ``count`` timesteps in [0, 1000), stratified over the batch. Each is drawn from a uniform distribution with
    probability ``uniform``, and otherwise from a logit-normal distribution (arXiv 2403.03206, section 3.1).

    The logit-normal distribution favours medium noise levels, at which most of the content that a caption describes is
    determined. A positive ``mean`` shifts the distribution towards more noise.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    plain = torch.rand(count, generator=generator) < uniform
    share = torch.where(plain, u, (torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6)) + mean).sigmoid().float())
    return (share * models.TRAIN_TIMESTEPS).long().clamp(max=models.TRAIN_TIMESTEPS - 1)


def v_loss(
    denoiser: nn.Module,
    inputs: DenoisingBatch,
    bars: Tensor,
    settings: UnetTraining,
    reads: reader.Reader | None = None,
    probe: reader.Probe | None = None,
    reading: float = 0.0,
) -> Tensor:
    """Returns the mean squared error of v = alpha * noise - sigma * x (arXiv 2202.00512), weighted by
    ``inputs.weight``. Adds ``reading`` times the sum of two losses: that of ``reads``, which reads the predicted x0,
    and that of ``probe``.
    """
    bar = bars[inputs.t].view(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    noisy = alpha * inputs.latents + sigma * inputs.noise
    target = alpha * inputs.noise - sigma * inputs.latents
    predicted = denoiser(noisy, inputs.t, inputs.ids).float()
    loss = (inputs.weight[:, None] * (predicted - target).square()).mean()
    if reads is None or not reading:
        return loss
    guess = alpha * noisy - sigma * predicted
    unread = reads.loss(guess, inputs.caption_attributes, inputs.again, inputs.level, bars, settings.reading)
    if probe is not None:
        unread = unread + probe.loss(inputs.caption_attributes, settings.probing)
    return loss + reading * unread
