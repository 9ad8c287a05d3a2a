"""Teaches the denoiser the meaning of words that describe shape, using a reader of noisy latents and a probe in the
U-Net.

Depicting the view that a caption names reduces the squared error only slightly. With the squared error alone, the
denoiser did not learn the words for views from half a million pictures. Two additional losses are therefore used during
training. The first requires that the caption's attributes can be read from the predicted clean latents after noise has
been added to them again (similar losses are used in arXiv 2401.00110 and 2411.04873). The second requires that the
attributes can be read from the middle of the U-Net (deep supervision, arXiv 1409.5185). The weights of both losses fall
to 0 before the end of training, so that only the squared error drives the final steps.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.optimizers import AdamW
from shared.pretrain.run_task import RunSettings, run_task
from shared.pretrain.task import Compute, PretrainTask
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import models
from shared.pretrain.toybox.run_folder import training_folder
from shared.toybox.captions import CAPTION_ATTRIBUTES
from shared.train.loop import generator
from shared.train.task import Update, Updates
from shared.trainable import TrainableGroup

_NOISIEST = 600  # before latents are read, they are noised to a random timestep below this one


class Reader(nn.Module):
    """Maps noisy latents [B, C, H, W] to logits [B, values] for each attribute in `captions.CAPTION_ATTRIBUTES`."""

    def __init__(self, channels: int, widths: tuple[int, ...] = (48, 96, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for level, (before, width) in enumerate(itertools.pairwise((channels, *widths))):
            for inputs, step in ((before, 1 if level == 0 else 2), (width, 1)):
                layers += [nn.Conv2d(inputs, width, 3, step, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList([nn.Linear(2 * widths[-1], len(values)) for values in CAPTION_ATTRIBUTES.values()])

    def forward(self, noisy: Tensor) -> list[Tensor]:
        x = self.body(noisy)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).float()
        return [head(pooled) for head in self.heads]

    def loss(
        self,
        clean: Tensor,
        attributes: Tensor,
        noise: Tensor,
        t: Tensor,
        bars: Tensor,
        weights: Sequence[float] = (1, 1, 1),
    ) -> Tensor:
        """Adds noise to latents, reads the captions' attributes from the result, and returns the cross-entropy.

        Args:
            clean: clean latents [B, C, H, W], or a prediction of them
            attributes: [B, 3], as returned by `captions.caption_attributes`; -1 marks an attribute that is not named
            noise: [B, C, H, W]
            t: the noise levels, as timesteps [B] in [0, 1000)
            bars: the cumulative products of the noise schedule's alphas
            weights: the loss weight of each attribute

        Returns:
            the weighted sum over attributes, averaged over all pictures, as a scalar. Attributes that are not named
            contribute 0.
        """
        bar = bars[t].view(-1, 1, 1, 1)
        read = self(bar.sqrt() * clean + (1 - bar).sqrt() * noise)
        return _cross_entropy(read, attributes, weights)


class Probe(nn.Module):
    """Reads a caption's attributes from the middle of a U-Net during training.

    The probe's loss trains the U-Net to represent the attributes in the middle block, where all later layers can use
    them. The U-Net may run in several threads, so the activations are stored per thread.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        channels = unet.config.block_out_channels[-1]
        self.norm = nn.LayerNorm(2 * channels)
        self.heads = nn.ModuleList([nn.Linear(2 * channels, len(values)) for values in CAPTION_ATTRIBUTES.values()])
        self.seen = threading.local()
        unet.mid_block.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.middle = output

    def loss(self, attributes: Tensor, weights: Sequence[float]) -> Tensor:
        """Returns the weighted cross-entropy, as in `Reader.loss`, for the U-Net's latest forward pass in this
        thread."""
        middle = self.seen.middle.float()
        pooled = self.norm(torch.cat([middle.mean((2, 3)), middle.amax((2, 3))], 1))
        return _cross_entropy([head(pooled) for head in self.heads], attributes, weights)


def _cross_entropy(read: Sequence[Tensor], attributes: Tensor, weights: Sequence[float]) -> Tensor:
    terms = [
        weight * F.cross_entropy(logits.float(), attributes[:, k], ignore_index=-1, reduction="sum")
        for k, (logits, weight) in enumerate(zip(read, weights, strict=True))
    ]
    return torch.stack(terms).sum() / len(attributes)


def draw_noise(clean: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws noise with the shape of ``clean``, and uniformly distributed timesteps [B] at which attributes can still be
    read."""
    return torch.randn(clean.shape, generator=g), torch.randint(_NOISIEST, (len(clean),), generator=g)


def soften(clean: Tensor, g: torch.Generator) -> Tensor:
    """Blurs about half of the latents in ``clean`` ([B, C, H, W]) with a Gaussian whose standard deviation is between
    0.3 and 1.2 cells. Latents predicted from very noisy ones are similarly blurry."""
    sigma = 0.3 + 0.9 * torch.rand(len(clean), generator=g)
    sigma = torch.where(torch.rand(len(clean), generator=g) < 0.5, sigma, torch.full_like(sigma, 1e-2))
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma[:, None]) ** 2)
    taps = taps / taps.sum(1, keepdim=True)
    _, channels, height, width = clean.shape
    padded = F.pad(clean, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
    kernel = (taps[:, :, None] * taps[:, None]).repeat_interleave(channels, 0)[:, None]
    return F.conv2d(padded, kernel, groups=len(kernel))[0].unflatten(0, (-1, channels))[..., :height, :width]


_ADAMW = AdamW(weight_decay=1e-2, warmup=100, schedule="linear", decay=0.8, max_grad_norm=None)


@dataclass(frozen=True)
class ReaderTraining:
    """Settings for training the reader, which takes about five minutes on one core. ``lr`` is the peak learning
    rate."""

    steps: int = 1600
    batch: int = 128
    lr: float = 2e-3
    optimizer: AdamW = _ADAMW
    seed: int = 0


class ReaderTask(PretrainTask):
    """The task that trains the reader on noised latents, about half of which are blurred before noise is added."""

    def __init__(self, settings: ReaderTraining, data: cache.Cache, compute: Compute) -> None:
        self.settings, self.data, self.compute = settings, data, compute
        self.seed, self.batch_size = settings.seed, settings.batch
        torch.manual_seed(settings.seed)
        reader: Any = Reader(data.latents.shape[1])
        self.reader = reader.to(compute.device, memory_format=torch.channels_last)
        self.bars = models.alphas_bar().to(compute.device)
        self.modules = {"model": self.reader}
        self.optimizers = {"main": settings.optimizer}
        self.facts = {"seed": settings.seed, "batch": settings.batch}

    def groups(self) -> dict[str, list[TrainableGroup]]:
        return {"main": [TrainableGroup("reader", list(self.reader.parameters()), self.settings.lr)]}

    def updates(self, step: int, micro: int) -> Updates:
        """Yields one loss, on newly drawn pictures and captions."""
        data, g = self.data, generator(self.seed, step, micro)
        index = torch.randint(len(data), (self.batch_size,), generator=g).numpy()
        variant = torch.randint(data.caption_attributes.shape[1], (self.batch_size,), generator=g).numpy()
        named = torch.from_numpy(data.caption_attributes[index, variant].astype(np.int64))
        clean = soften(torch.from_numpy(np.asarray(data.latents[index], dtype=np.float32)), g)
        inputs = (x.to(self.compute.device) for x in (clean, named, *draw_noise(clean, g)))
        with self.compute.autocast():
            loss = self.reader.loss(*inputs, self.bars)
        yield Update(loss)


def train_reader(data: cache.Cache, out: Path, run: RunSettings, settings: ReaderTraining = ReaderTraining()) -> Reader:
    """Returns the frozen reader from the run's folder `out`. Its training is completed first if necessary.

    Args:
        data: the cached latents and the attributes named in their captions
        run: determines the device and whether training resumes; the number of steps comes from `settings`
    """
    run = replace(run, steps=settings.steps, minutes=None, pause_at=None)
    task = ReaderTask(settings, data, run.compute())
    run_task(task, run, training_folder(out, "reader"))
    return task.reader.eval().requires_grad_(False)
