"""The autoencoder: 64×64 pictures to latents of 16×16×4, and the cache of those latents.

Trained on whole pictures (group norms and the attention in the middle see other statistics on crops: 3 dB less on
what they were trained on, when measured), with L1 and squared errors of pixels, L1 of their differences, all counted
more where the thing is, whose pattern tells individuals apart, and a tiny KL. When the budget ends, the averaged weights are
*normalised*: each latent channel is shifted and scaled, inside the two 1×1 convolutions around the latents, to zero mean
and a common spread, whose inverse is the ``scaling_factor``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shared.pretrain.toybox import assemble, common, models

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

HELD_OUT = 256
"""Pictures at the data's end that the autoencoder never trains on: its PSNR is measured there."""


class Pictures(Protocol):
    """What the trainings read of a data set (``shared.pretrain.toybox.dataset.load`` gives it)."""

    @property
    def captions(self) -> Sequence[Sequence[str]]:
        """N times V captions."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, index: Any) -> np.ndarray:
        """The pictures of an index (integers or a slice) as uint8 [n, S, S, 3]."""
        ...

    def masks(self, index: Any) -> np.ndarray:
        """Where things are in the pictures of an index, bool [n, S, S]."""
        ...


@dataclass(frozen=True)
class VaeTraining:
    """Settings of the autoencoder's training; ``lr`` is AdamW's peak rate."""

    size: models.VaeSize = field(default_factory=models.VaeSize)
    batch: int = 8
    lr: float = 2e-3
    weight_decay: float = 1e-4
    square_weight: float = 2.0
    gradient_weight: float = 0.5
    kl_weight: float = 1e-5
    thing_weight: float = 3.0
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    bf16: bool = True
    save_minutes: float = 3.0
    log_every: int = 50


def to_signed(pixels: np.ndarray | Tensor) -> Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def draw(pictures: Pictures, among: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``count`` random pictures of the first ``among``: float [count, 3, S, S] in [-1, 1], and bool [count, 1, S, S],
    where things are.
    """
    rows = torch.randint(among, (count,), generator=generator).numpy()
    return to_signed(pictures.pixels(rows)), torch.from_numpy(pictures.masks(rows))[:, None]


def loss(
    vae: AutoencoderKL, x: Tensor, thing: Tensor, noise: Tensor, settings: VaeTraining
) -> tuple[Tensor, dict[str, float]]:
    """L1 and squares of pixels [B, 3, H, W], L1 of their differences, KL per latent element.

    Args:
        thing: bool [B, 1, H, W], where errors count ``thing_weight`` times
        noise: [B, 4, h, w], standard normal, for the posterior's sample

    Returns:
        the loss and its parts
    """
    posterior: Any = vae.encode(x, return_dict=True).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    decoded: Any = vae.decode(posterior.mean + posterior.std * noise, return_dict=True)
    y = decoded.sample.float()
    total, parts = reconstruction(y - x, thing, settings)
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return total + settings.kl_weight * kl, {**parts, "kl": float(kl.detach())}


def reconstruction(error: Tensor, thing: Tensor, settings: VaeTraining) -> tuple[Tensor, dict[str, float]]:
    """L1 and squares of errors [B, 3, H, W], L1 of their differences; ``thing`` [B, 1, H, W] is where they count more."""
    weight = torch.where(thing, settings.thing_weight, 1.0)
    weight = weight / weight.mean()
    pixel = (weight * error.abs()).mean()
    gradient = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
    gradient = gradient + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    total = pixel + settings.square_weight * (weight * error.square()).mean() + settings.gradient_weight * gradient
    return total, {"l1": float(pixel.detach()), "psnr_batch": psnr_db(error.detach())}


def psnr_db(error: Tensor) -> float:
    """Peak signal-to-noise ratio of differences of pictures in [-1, 1], in dB (mean over all elements first)."""
    return float(10 * torch.log10(4.0 / error.double().square().mean()))


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 64) -> float:
    """The autoencoder's PSNR in dB over uint8 [N, S, S, 3], decoded from the posterior's mean, outputs clipped."""
    device = next(vae.parameters()).device
    squares = 0.0
    for start in range(0, len(pixels), batch):
        x = to_signed(pixels[start : start + batch]).to(device)
        latents: Any = vae.encode(x, return_dict=True)
        decoded: Any = vae.decode(latents.latent_dist.mean, return_dict=True)
        squares += float((decoded.sample.clamp(-1, 1) - x).double().square().sum())
    return float(10 * np.log10(4.0 * pixels.size / max(squares, 1e-12)))


class VaeRun:
    """A training under way: the network, its average, the optimizer and the step they are at."""

    def __init__(self, settings: VaeTraining, out: Path, device: torch.device, resume: bool) -> None:
        self.settings, self.path, self.device, self.step = settings, out / assemble.VAE_CHECKPOINT, device, 0
        torch.manual_seed(settings.seed)
        size = settings.size
        tree, facts = common.load_checkpoint(self.path) if resume and self.path.is_file() else ({}, {})
        if tree:
            size, self.step = models.size_from(models.VaeSize, facts["size"]), int(facts["step"])
        self.size = size
        self.vae = models.build_vae(size).to(device)  # pyright: ignore[reportArgumentType]
        self.ema = common.Ema(self.vae, settings.ema)
        groups = common.parameter_groups(self.vae, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), fused=True)
        if tree:
            self.vae.load_state_dict(tree["model"])
            self.ema.load(tree["ema"])
        if "optimizer" in tree:  # adopted weights come without
            common.restore_optimizer(self.optimizer, tree["optimizer"])

    def save(self) -> None:
        state = {"model": self.vae.state_dict(), "ema": self.ema.shadow}
        tensors = {**state, "optimizer": common.optimizer_tensors(self.optimizer)}
        common.save_checkpoint(self.path, tensors, {"step": self.step, "size": asdict(self.size)})

    def update(self, pictures: Pictures, among: int, factor: float) -> dict[str, float]:
        """One step on some of the first ``among`` pictures with the learning rate's ``factor``."""
        settings, generator = self.settings, common.step_generator(self.settings.seed, self.step)
        x, thing = (part.to(self.device) for part in draw(pictures, among, settings.batch, generator))
        grid = x.shape[-1] // 2 ** (len(self.size.channels) - 1)
        noise = torch.randn(len(x), models.LATENT_CHANNELS, grid, grid, generator=generator).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * factor
        with common.amp(self.device, settings.bf16):
            total, parts = loss(self.vae, x, thing, noise, settings)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), settings.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.vae, self.step)
        self.step += 1
        return {**parts, "norm": float(norm)}


def train_vae(
    data: Path,
    out: Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    decay: float = 0.3,
    resume: bool = True,
    threads: int | None = None,
    device: str | None = None,
    settings: VaeTraining = VaeTraining(),
) -> Path:
    """Trains the autoencoder and writes its normalised average to ``out/vae``.

    Args:
        data: a data set's folder
        out: the run's folder (checkpoint, log and result)
        steps: ends the training at this step of the run, or
        minutes: ends it after this time of this session
        decay: the last fraction of the budget, over which the learning rate falls to 0
        resume: go on from ``out``'s checkpoint where there is one
        threads: of torch on a CPU
        device: as torch names it; the GPU if there is one where None

    Returns:
        the folder of the finished autoencoder
    """
    from shared.pretrain.toybox import dataset

    common.set_threads(threads)
    budget = common.Budget(steps=steps, minutes=minutes, decay=decay, warmup=100)
    run = VaeRun(settings, out, common.pick_device(device), resume)
    pictures = dataset.load(data)
    fit(run, pictures, budget, common.Log(out / "vae_log.jsonl"))
    return out / assemble.VAE_FOLDER if finished(run, out) else finish(run, pictures, out)


def finished(run: VaeRun, out: Path) -> bool:
    """Whether ``out/vae`` is this very autoencoder, whose decoder may have been taught on since: then it is left alone."""
    if not (out / assemble.VAE_FOLDER / "config.json").is_file():
        return False
    there = assemble.frozen_vae(out).encoder.state_dict()
    return all(torch.equal(there[name], run.ema.shadow[f"encoder.{name}"].cpu()) for name in there)


def fit(run: VaeRun, pictures: Pictures, budget: common.Budget, log: common.Log) -> None:
    """The loop; checkpoints by the clock."""
    settings, among = run.settings, train_count(pictures)
    common.fit(
        run, lambda factor: run.update(pictures, among, factor), budget, log, settings.log_every, settings.save_minutes
    )


def train_count(pictures: Pictures) -> int:
    """How many of the pictures, from the first, may be trained on."""
    n = len(pictures)
    return n - min(HELD_OUT, n // 10)


@torch.no_grad()
def finish(run: VaeRun, pictures: Pictures, out: Path) -> Path:
    """Normalises the averaged autoencoder, measures it on held-out pictures and writes ``out/vae``."""
    vae = models.build_vae(run.size).to(run.device).eval()  # pyright: ignore[reportArgumentType]
    vae.load_state_dict(run.vae.state_dict())
    run.ema.copy_to(vae)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(train_count(pictures), min(2048, train_count(pictures)), replace=False))
    normalise(vae, pictures.pixels(chosen))
    decibels = psnr(vae, pictures.pixels(slice(train_count(pictures), None)))
    common.Log(out / "vae_log.jsonl").write(step=run.step, psnr=decibels, scaling_factor=vae.config["scaling_factor"])
    folder = out / assemble.VAE_FOLDER
    vae.save_pretrained(str(folder))
    (out / assemble.DECODER_CHECKPOINT).unlink(missing_ok=True)  # of other latents
    return folder


@torch.no_grad()
def normalise(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 64) -> None:
    """Gives each latent channel zero mean and the common spread 1 / ``scaling_factor``; pictures stay the same.

    Folded into ``quant_conv`` (means and log-variances) and undone in ``post_quant_conv``.
    """
    device = next(vae.parameters()).device
    parts = [to_signed(pixels[i : i + batch]).to(device) for i in range(0, len(pixels), batch)]
    means: list[Any] = [vae.encode(x, return_dict=True) for x in parts]
    latents = torch.cat([m.latent_dist.mean for m in means]).double()
    shift, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    common_spread = spread.square().mean().sqrt()
    scale = spread / common_spread  # old = new * scale + shift
    c, before, after = models.LATENT_CHANNELS, vae.quant_conv, vae.post_quant_conv
    assert before is not None and after is not None and before.bias is not None and after.bias is not None
    after.bias += (after.weight[:, :, 0, 0].double() @ shift).float()
    after.weight *= scale.float()[None, :, None, None]
    before.weight[:c] /= scale.float()[:, None, None, None]
    before.bias[:c] = ((before.bias[:c].double() - shift) / scale).float()
    before.bias[c:] -= 2 * scale.log().float()
    vae.register_to_config(scaling_factor=round(float(1 / common_spread), 5))
