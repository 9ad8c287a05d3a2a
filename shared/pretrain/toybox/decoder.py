"""Trains the autoencoder's decoder further, against a discriminator, to get sharper pictures from the same latents.

Squared and absolute errors are smallest for an average of all the pictures that a latent could represent, and such an
average is blurred. Therefore, once the latents are final, the decoder is trained further with two additional losses.
Both come from a network that learns to distinguish the decoder's pictures from rendered pictures. They are an
adversarial loss with the adaptive weight of arXiv 2012.09841, eq. 7, and a feature-matching loss. The encoder is
frozen, so everything trained on its latents stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.optimizers import AdamW
from shared.pretrain.run_task import RunSettings, run_task
from shared.pretrain.task import Compute, PretrainTask
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import vae as pixels
from shared.pretrain.toybox.discriminator import Discriminator, feature_distance, hinge_loss
from shared.pretrain.toybox.run_folder import VAE_FOLDER, frozen_vae, tokenizer_of, training_folder
from shared.train.averages import Averages
from shared.train.loop import generator
from shared.train.task import Update, Updates
from shared.trainable import TrainableGroup

_ADAM = AdamW(betas=(0.5, 0.99), weight_decay=0.0, warmup=100, schedule="linear", decay=0.5)
_UNCLIPPED = _ADAM.model_copy(update={"max_grad_norm": None})


@dataclass(frozen=True)
class DecoderTraining:
    """Settings for training the decoder. ``lr`` is its peak learning rate.

    adversarial: the norm of the adversarial loss's gradient at the last layer, relative to the norm of the other
        losses' gradient
    matching: the weight of the feature-matching loss
    alone: the number of steps over which these two weights rise from 0, so that the discriminator can learn first
    """

    batch: int = 8
    lr: float = 3e-4
    optimizer: AdamW = _ADAM
    discriminator_lr: float = 5e-4
    discriminator_optimizer: AdamW = _UNCLIPPED
    adversarial: float = 0.4
    matching: float = 0.5
    alone: int = 300
    ema: float = 0.998
    seed: int = 0
    pixel: pixels.VaeTraining = field(default_factory=pixels.VaeTraining)


class DecoderTask(PretrainTask):
    """The task that trains the decoder. Each step first updates the discriminator, then the decoder.

    The networks use the channels_last format, which makes convolutions on a CPU faster. After a run is resumed, the
    optimizer's moments no longer have this format. torch's plain Adam kernels accept such moments, but the fused kernel
    misreads them.
    """

    def __init__(
        self, settings: DecoderTraining, pictures: pixels.Pictures, latents: np.ndarray, out: Path, compute: Compute
    ) -> None:
        self.settings, self.pictures, self.latents, self.out = settings, pictures, latents, out
        self.compute, self.seed, self.batch_size = compute, settings.seed, settings.batch
        self.among = pixels.train_count(pictures)
        torch.manual_seed(settings.seed)
        vae: Any = frozen_vae(out).to(compute.device)  # pyright: ignore[reportArgumentType]
        self.vae, self.decoder = vae, nn.ModuleList([vae.post_quant_conv, vae.decoder])
        self.decoder.requires_grad_(True).train()
        self.discriminator = Discriminator().to(compute.device)
        for network in (self.vae, self.discriminator):
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.modules = {"model": self.decoder, "discriminator": self.discriminator}
        self.ema = self.averages = Averages(dict(self.decoder.named_parameters()), settings.ema)
        self.optimizers = {"discriminator": settings.discriminator_optimizer, "decoder": settings.optimizer}
        self.facts = {"seed": settings.seed, "batch": settings.batch}

    def groups(self) -> dict[str, list[TrainableGroup]]:
        settings = self.settings
        discriminator = TrainableGroup(
            "discriminator", list(self.discriminator.parameters()), settings.discriminator_lr
        )
        return {
            "discriminator": [discriminator],
            "decoder": [TrainableGroup("decoder", list(self.decoder.parameters()), settings.lr)],
        }

    def decode(self, latents: Tensor) -> Tensor:
        """Decodes scaled latents [B, C, h, w] to pictures [B, 3, H, W] in [-1, 1]."""
        return self.decoder[1](self.decoder[0](latents / self.vae.config.scaling_factor))

    def updates(self, step: int, micro: int) -> Updates:
        """Yields the discriminator's loss and then, once the discriminator has been updated, the decoder's loss."""
        settings, draws = self.settings, generator(self.seed, step, micro)
        index = torch.randint(self.among, (settings.batch,), generator=draws).numpy()
        layout: Any = {"device": self.compute.device, "memory_format": torch.channels_last}
        real = pixels.to_signed(self.pictures.pixels(index)).to(**layout)
        thing = torch.from_numpy(self.pictures.masks(index))[:, None].to(self.compute.device)
        latents = torch.from_numpy(np.asarray(self.latents[index], dtype=np.float32)).to(**layout)
        with self.compute.autocast():
            decoded = self.decode(latents)
            shown = decoded.detach()
            told_apart = hinge_loss(self.discriminator(real)[0].float(), self.discriminator(shown)[0].float())
        yield Update(told_apart, ("discriminator",), {"discriminator": told_apart.detach()})
        with self.compute.autocast():
            total, parts = self.loss(decoded, real, thing, min(1.0, step / max(settings.alone, 1)))
        yield Update(total, ("decoder",), parts)

    def loss(self, decoded: Tensor, real: Tensor, thing: Tensor, trust: float) -> tuple[Tensor, dict[str, float]]:
        """Computes the decoder's loss and its parts.

        Args:
            decoded: decoded pictures [B, 3, H, W] in [-1, 1], attached to the autograd graph
            real: the rendered pictures, which are the target
            thing: bool [B, 1, H, W], the pixels at which errors count more
            trust: the factor in [0, 1] by which the weights of the discriminator's losses are currently multiplied
        """
        settings, last = self.settings, self.vae.decoder.conv_out.weight
        logits, features = self.discriminator(decoded)
        with torch.no_grad():
            wanted = self.discriminator(real)[1]
        matching = feature_distance(features, wanted)
        faithful, parts = pixels.reconstruction(decoded.float() - real, thing, settings.pixel)
        faithful = faithful + trust * settings.matching * matching
        fooled = -logits.float().mean()
        keep: Any = {"retain_graph": True}
        ours, theirs = (torch.autograd.grad(x, last, **keep)[0].norm() for x in (faithful, fooled))
        weight = (ours / (theirs + 1e-4)).clamp(max=10.0).detach()
        total = faithful + trust * settings.adversarial * weight * fooled
        return total, {**parts, "matching": float(matching.detach()), "weight": float(weight)}

    @torch.no_grad()
    def result(self) -> dict[str, float]:
        """Writes the autoencoder with the averaged decoder to `out/vae`, and measures it on held-out pictures."""
        vae: Any = frozen_vae(self.out).to(self.compute.device)  # pyright: ignore[reportArgumentType]
        self.ema.copy_to(dict(nn.ModuleList([vae.post_quant_conv, vae.decoder]).named_parameters()))
        decibels = pixels.psnr(vae, self.pictures.pixels(slice(self.among, None)))
        vae.save_pretrained(str(self.out / VAE_FOLDER))
        return {"psnr": decibels}


def train_decoder(data: Path, out: Path, run: RunSettings, settings: DecoderTraining = DecoderTraining()) -> Path:
    """Continues training the decoder of the finished autoencoder in the run's folder `out`, on the data set in `data`.

    Returns:
        the folder with the autoencoder, which now contains the averaged decoder
    """
    from shared.pretrain.toybox import dataset

    folder, compute, pictures = training_folder(out, "decoder"), run.compute(), dataset.load(data)
    cached = cache.build(out / "latents", pictures, frozen_vae(out), tokenizer_of(out), compute.device)
    run_task(DecoderTask(settings, pictures, cached.latents, out, compute), run, folder)
    return out / VAE_FOLDER
