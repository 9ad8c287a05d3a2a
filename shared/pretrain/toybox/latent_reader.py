"""A reader of noisy latents and a probe of the U-Net, which teach the denoiser what the words for shape mean.

Alone, the denoiser's squared error rewards the word for a view so little that half a million pictures did not teach it.
So while it learns, what the caption says must be readable off its guess of the clean latents, noised again (a loss on
what a network sees in a prediction, as in arXiv 2401.00110 and 2411.04873), and off the middle of the U-Net (deep
supervision, arXiv 1409.5185). The weights of both fall to 0 before the end: there the squared error alone has the word.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.pretrain.toybox import common, models
from shared.pretrain.toybox import latent_cache as cache
from shared.toybox.captions import SAID

CHECKPOINT = "reader.safetensors"
_NOISIEST = 600  # timestep up to which pictures are noised before they are read
_BATCH = 128


class Reader(nn.Module):
    """Noisy latents [B, 4, H, W] to logits of what is in them, one [B, values] per entry of `captions.SAID`."""

    def __init__(self, widths: tuple[int, ...] = (48, 96, 160)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise((models.LATENT_CHANNELS, *widths)):
            stride = 1 if before == models.LATENT_CHANNELS else 2
            for inputs, step in ((before, stride), (width, 1)):
                layers += [nn.Conv2d(inputs, width, 3, step, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleList([nn.Linear(2 * widths[-1], len(values)) for values in SAID.values()])

    def forward(self, noisy: Tensor) -> list[Tensor]:
        x = self.body(noisy)
        pooled = torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1).float()
        return [head(pooled) for head in self.heads]

    def loss(
        self, clean: Tensor, said: Tensor, noise: Tensor, t: Tensor, bars: Tensor, weights: Sequence[float] = (1, 1, 1)
    ) -> Tensor:
        """Mean cross-entropy of what is said, read off latents that are noised first.

        Args:
            clean: latents [B, 4, H, W], or a guess of them
            said: [B, 3] as `captions.said`, -1 where nothing is
            noise: [B, 4, H, W]
            t: how much of it, timesteps [B] in [0, 1000)
            bars: the schedule's cumulative products
            weights: of what can be said

        Returns:
            a scalar, the weighted sum over what can be said; per picture, so that unsaid things count as 0
        """
        bar = bars[t].view(-1, 1, 1, 1)
        read = self(bar.sqrt() * clean + (1 - bar).sqrt() * noise)
        return _unread(read, said, weights)


class Probe(nn.Module):
    """Reads what a caption says off the middle of a U-Net, while it learns.

    What the words say must arrive there before the layers after it can draw it. The U-Net may run in several threads,
    so each remembers its own middle.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__()
        channels = unet.config.block_out_channels[-1]
        self.norm = nn.LayerNorm(2 * channels)
        self.heads = nn.ModuleList([nn.Linear(2 * channels, len(values)) for values in SAID.values()])
        self.seen = threading.local()
        unet.mid_block.register_forward_hook(self._see)

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.middle = output

    def loss(self, said: Tensor, weights: Sequence[float]) -> Tensor:
        """Weighted cross-entropy as `Reader.loss`, of the U-Net's latest forward pass in this thread."""
        middle = self.seen.middle.float()
        pooled = self.norm(torch.cat([middle.mean((2, 3)), middle.amax((2, 3))], 1))
        return _unread([head(pooled) for head in self.heads], said, weights)


def _unread(read: Sequence[Tensor], said: Tensor, weights: Sequence[float]) -> Tensor:
    terms = [
        weight * F.cross_entropy(logits.float(), said[:, k], ignore_index=-1, reduction="sum")
        for k, (logits, weight) in enumerate(zip(read, weights, strict=True))
    ]
    return torch.stack(terms).sum() / len(said)


def draw_noise(clean: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise like ``clean`` and timesteps [B], uniform up to where a reader still sees something."""
    return torch.randn(clean.shape, generator=g), torch.randint(_NOISIEST, (len(clean),), generator=g)


def soften(clean: Tensor, g: torch.Generator) -> Tensor:
    """Blurs half of [B, 4, H, W] by up to a latent: a guess under much noise is blurred."""
    sigma = 0.3 + 0.9 * torch.rand(len(clean), generator=g)
    sigma = torch.where(torch.rand(len(clean), generator=g) < 0.5, sigma, torch.full_like(sigma, 1e-2))
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma[:, None]) ** 2)
    taps = taps / taps.sum(1, keepdim=True)
    _, channels, height, width = clean.shape
    padded = F.pad(clean, (2, 2, 2, 2), mode="replicate").flatten(0, 1)[None]
    kernel = (taps[:, :, None] * taps[:, None]).repeat_interleave(channels, 0)[:, None]
    return F.conv2d(padded, kernel, groups=len(kernel))[0].unflatten(0, (-1, channels))[..., :height, :width]


def train_reader(
    data: cache.Cache, out: Path, bars: Tensor, device: torch.device, steps: int = 1600, lr: float = 2e-3, seed: int = 0
) -> Reader:
    """The reader of ``out``, trained there first where there is none; frozen.

    Args:
        data: latents and what their captions say
        out: the run's folder
        bars: the schedule's cumulative products, on ``device``
        device: where it is trained and left
        steps: of 128 pictures; about five minutes of one core
        lr: AdamW's peak rate, falling to 0
        seed: of everything drawn
    """
    torch.manual_seed(seed)
    reader = Reader().to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    path = out / CHECKPOINT
    if path.is_file():
        reader.load_state_dict(common.load_checkpoint(path)[0]["model"])
        return reader.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=lr, weight_decay=1e-2)
    budget, log = common.Budget(steps=steps, warmup=100, decay=0.8), common.Log(out / "reader_log.jsonl")
    for step in range(steps):
        g = common.step_generator(seed + 1, step)
        index = torch.randint(len(data), (_BATCH,), generator=g).numpy()
        variant = torch.randint(data.said.shape[1], (_BATCH,), generator=g).numpy()
        said = torch.from_numpy(data.said[index, variant].astype(np.int64)).to(device)
        clean = soften(torch.from_numpy(np.asarray(data.latents[index], dtype=np.float32)), g)
        noise, t = draw_noise(clean, g)
        for group in optimizer.param_groups:
            group["lr"] = lr * budget.rate(step, 0.0)
        with common.amp(device, True):
            loss = reader.loss(clean.to(device), said, noise.to(device), t.to(device), bars)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            log.write(step=step + 1, loss=round(float(loss.detach()), 4))
    common.save_checkpoint(path, {"model": reader.state_dict()}, {"steps": steps, "loss": float(loss.detach())})
    return reader.eval().requires_grad_(False)
