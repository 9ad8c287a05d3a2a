"""Trains the autoencoder, which encodes 64×64 pictures as 16×16 latents.

It is trained on whole pictures. In one experiment, training on crops lowered the PSNR by 3 dB, because the group
norms and the middle attention layer see different statistics on crops. The loss is a weighted sum of the L1 and
squared errors of pixels, the L1 error of differences between neighbouring pixels, and a small KL term. Errors on the
depicted thing count more, because the thing is identified by its pattern. When the budget is spent, the averaged
weights are *normalised*. The two 1×1 convolutions around the latents are changed so that all latent channels have
zero mean and the same standard deviation. The inverse of this standard deviation is the ``scaling_factor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shared.optimizers import AdamW
from shared.pretrain.run_task import RunSettings, run_task
from shared.pretrain.task import Compute, PretrainTask, decay_groups
from shared.pretrain.toybox import models
from shared.pretrain.toybox.run_folder import VAE_FOLDER, frozen_vae, has_vae, training_folder
from shared.train import checkpoint
from shared.train.averages import Averages
from shared.train.loop import generator
from shared.train.task import Update, Updates
from shared.trainable import TrainableGroup

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

HELD_OUT = 256
"""The maximum number of pictures at the end of the data that are held out from training to measure the PSNR."""


class Pictures(Protocol):
    """The interface of a data set for training, as returned by ``shared.pretrain.toybox.dataset.load``."""

    @property
    def captions(self) -> Sequence[Sequence[str]]:
        """Returns V captions for each of the N pictures."""
        ...

    def __len__(self) -> int: ...

    def pixels(self, index: Any) -> np.ndarray:
        """Returns the pictures at `index` (integers or a slice) as uint8 [n, S, S, 3]."""
        ...

    def masks(self, index: Any) -> np.ndarray:
        """Returns the masks of the things in the pictures at `index`, as bool [n, S, S]."""
        ...


_ADAMW = AdamW(betas=(0.9, 0.99), weight_decay=1e-4, warmup=100, schedule="linear", decay=0.3)


@dataclass(frozen=True)
class VaeTraining:
    """Settings for training the autoencoder; ``lr`` is the peak learning rate."""

    size: models.VaeSize = field(default_factory=models.VaeSize)
    batch: int = 6
    lr: float = 2e-3
    optimizer: AdamW = _ADAMW
    square_weight: float = 2.0
    gradient_weight: float = 0.5
    kl_weight: float = 1e-5
    thing_weight: float = 3.0
    ema: float = 0.998
    seed: int = 0


def to_signed(pixels: np.ndarray | Tensor) -> Tensor:
    """Converts pictures from uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def draw(pictures: Pictures, among: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws ``count`` random pictures from the first ``among``. Returns the pictures (float [count, 3, S, S] in
    [-1, 1]) and the masks of the things in them (bool [count, 1, S, S]).
    """
    rows = torch.randint(among, (count,), generator=generator).numpy()
    return to_signed(pictures.pixels(rows)), torch.from_numpy(pictures.masks(rows))[:, None]


def loss(
    vae: AutoencoderKL, x: Tensor, thing: Tensor, noise: Tensor, settings: VaeTraining
) -> tuple[Tensor, dict[str, float]]:
    """Computes the `reconstruction` loss of the pictures ``x``, plus the weighted KL divergence per latent element.

    Args:
        x: pictures [B, 3, H, W] in [-1, 1]
        thing: bool [B, 1, H, W], the pixels at which errors count ``thing_weight`` times
        noise: standard normal noise [B, C, h, w], from which the posterior is sampled

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
    """Computes the weighted sum of the L1 and squared losses of pixel errors, and of the L1 loss of differences between
    neighbouring errors.

    Args:
        error: the errors of the decoded pictures, [B, 3, H, W]
        thing: bool [B, 1, H, W], the pixels at which errors count ``thing_weight`` times

    Returns:
        the loss, and the L1 error and PSNR of the batch
    """
    weight = torch.where(thing, settings.thing_weight, 1.0)
    weight = weight / weight.mean()
    pixel = (weight * error.abs()).mean()
    gradient = (weight[..., 1:] * error.diff(dim=-1).abs()).mean()
    gradient = gradient + (weight[..., 1:, :] * error.diff(dim=-2).abs()).mean()
    total = pixel + settings.square_weight * (weight * error.square()).mean() + settings.gradient_weight * gradient
    return total, {"l1": float(pixel.detach()), "psnr_batch": psnr_db(error.detach())}


def psnr_db(error: Tensor) -> float:
    """Returns the peak signal-to-noise ratio in dB, given the elementwise errors of pictures in [-1, 1]."""
    return float(10 * torch.log10(4.0 / error.double().square().mean()))


@torch.no_grad()
def psnr(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 64) -> float:
    """Returns the autoencoder's PSNR in dB on pictures (uint8 [N, S, S, 3]). The reconstructions are decoded from the
    posterior's mean and clipped."""
    device = next(vae.parameters()).device
    squares = 0.0
    for start in range(0, len(pixels), batch):
        x = to_signed(pixels[start : start + batch]).to(device)
        latents: Any = vae.encode(x, return_dict=True)
        decoded: Any = vae.decode(latents.latent_dist.mean, return_dict=True)
        squares += float((decoded.sample.clamp(-1, 1) - x).double().square().sum())
    return float(10 * np.log10(4.0 * pixels.size / max(squares, 1e-12)))


class VaeTask(PretrainTask):
    """The task that trains the autoencoder."""

    def __init__(self, settings: VaeTraining, pictures: Pictures, out: Path, compute: Compute) -> None:
        self.settings, self.pictures, self.out, self.compute = settings, pictures, out, compute
        self.seed, self.batch_size, self.among = settings.seed, settings.batch, train_count(pictures)
        torch.manual_seed(settings.seed)
        self.vae = models.build_vae(settings.size).to(compute.device)  # pyright: ignore[reportArgumentType]
        self.modules = {"model": self.vae}
        self.ema = self.averages = Averages(dict(self.vae.named_parameters()), settings.ema)
        self.optimizers = {"main": settings.optimizer}
        self.facts = {"seed": settings.seed, "batch": settings.batch, "size": asdict(settings.size)}

    def groups(self) -> dict[str, list[TrainableGroup]]:
        return {"main": decay_groups(self.vae, self.settings.lr, self.settings.optimizer.weight_decay)}

    def updates(self, step: int, micro: int) -> Updates:
        """Yields one loss, on newly drawn pictures."""
        settings, draws = self.settings, generator(self.seed, step, micro)
        x, thing = (part.to(self.compute.device) for part in draw(self.pictures, self.among, settings.batch, draws))
        grid = x.shape[-1] // 2 ** (len(settings.size.channels) - 1)
        noise = torch.randn(len(x), settings.size.latent_channels, grid, grid, generator=draws)
        with self.compute.autocast():
            total, parts = loss(self.vae, x, thing, noise.to(self.compute.device), settings)
        yield Update(total, parts=parts)

    def averaged(self) -> AutoencoderKL:
        """Returns a copy of the autoencoder with the averaged parameters, before normalisation."""
        vae = models.build_vae(self.settings.size).to(self.compute.device).eval()  # pyright: ignore[reportArgumentType]
        vae.load_state_dict(self.vae.state_dict())
        self.ema.copy_to(dict(vae.named_parameters()))
        return vae

    @torch.no_grad()
    def result(self) -> dict[str, float]:
        """Normalises the averaged autoencoder, measures it on held-out pictures and writes `out/vae`.

        If `out/vae` already contains this autoencoder, it is left unchanged, because its decoder may have been trained
        further.
        """
        if self.is_written():
            return {}
        vae, rng = self.averaged(), np.random.default_rng(0)
        chosen = np.sort(rng.choice(self.among, min(2048, self.among), replace=False))
        normalise(vae, self.pictures.pixels(chosen))
        decibels = psnr(vae, self.pictures.pixels(slice(self.among, None)))
        vae.save_pretrained(str(self.out / VAE_FOLDER))
        checkpoint.clear(training_folder(self.out, "decoder"))  # the old decoder was trained on different latents
        return {"psnr": decibels, "scaling_factor": vae.config["scaling_factor"]}

    def is_written(self) -> bool:
        """Returns whether the encoder in `out/vae` is identical to the averaged encoder of this run."""
        if not has_vae(self.out):
            return False
        written, averages = frozen_vae(self.out).encoder.state_dict(), self.ema.state_dict()
        return all(torch.equal(written[name], averages[f"encoder.{name}"]) for name in written)


def train_vae(data: Path, out: Path, run: RunSettings, settings: VaeTraining = VaeTraining()) -> Path:
    """Trains the autoencoder on the data set in `data` and writes its normalised average to the run's folder `out`.

    Returns:
        the folder with the finished autoencoder
    """
    from shared.pretrain.toybox import dataset

    folder, compute = training_folder(out, "vae"), run.compute()
    run_task(VaeTask(settings, dataset.load(data), out, compute), run, folder)
    return out / VAE_FOLDER


def train_count(pictures: Pictures) -> int:
    """Returns the number of pictures, from the start of the data, that are used for training. The rest are held out."""
    n = len(pictures)
    return n - min(HELD_OUT, n // 10)


@torch.no_grad()
def normalise(vae: AutoencoderKL, pixels: np.ndarray, batch: int = 64) -> None:
    """Gives each latent channel zero mean and the same standard deviation, 1 / ``scaling_factor``, without changing
    decoded pictures.

    The change is folded into ``quant_conv``, for both means and log-variances, and undone in ``post_quant_conv``.
    """
    device = next(vae.parameters()).device
    parts = [to_signed(pixels[i : i + batch]).to(device) for i in range(0, len(pixels), batch)]
    means: list[Any] = [vae.encode(x, return_dict=True) for x in parts]
    latents = torch.cat([m.latent_dist.mean for m in means]).double()
    shift, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    factor = round(float(1 / spread.square().mean().sqrt()), 5)
    scale = spread * factor  # old = new * scale + shift
    c, before, after = len(shift), vae.quant_conv, vae.post_quant_conv
    assert before is not None and after is not None and before.bias is not None and after.bias is not None
    after.bias += (after.weight[:, :, 0, 0].double() @ shift).float()
    after.weight *= scale.float()[None, :, None, None]
    before.weight[:c] /= scale.float()[:, None, None, None]
    before.bias[:c] = ((before.bias[:c].double() - shift) / scale).float()
    before.bias[c:] -= 2 * scale.log().float()
    vae.register_to_config(scaling_factor=factor)
