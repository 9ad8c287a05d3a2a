"""Sharper pictures of the same latents: the decoder alone, taught on by a discriminator.

Squares and absolute values of errors are least where every picture that a latent may mean is averaged, and an average has no
edges. So once the latents stand, the decoder is trained on with what they were trained with, and besides against a network
that tells its pictures from the renderer's patch by patch (arXiv 1611.07004; hinge loss, arXiv 1705.02894), with that
network's features to match (arXiv 1711.11585, eq. 2) and the weight of arXiv 2012.09841, eq. 7. The encoder stays as it is:
nothing that was learned on its latents changes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.pretrain.toybox import assemble, common
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import vae as pixels


@dataclass(frozen=True)
class DecoderTraining:
    """Settings; ``lr`` is Adam's peak rate for the decoder, ``critic_lr`` for the discriminator. ``adversarial`` is the share
    of the gradient at the last layer that is the discriminator's, ``matching`` the weight of its features; both rise over
    the first ``alone`` steps, in which the discriminator learns what there is to see.
    """

    batch: int = 8
    lr: float = 3e-4
    critic_lr: float = 5e-4
    adversarial: float = 0.4
    matching: float = 0.5
    alone: int = 300
    clip: float = 1.0
    ema: float = 0.998
    seed: int = 0
    bf16: bool = True
    save_minutes: float = 3.0
    log_every: int = 50
    pixel: pixels.VaeTraining = field(default_factory=pixels.VaeTraining)


class Critic(nn.Module):
    """Pictures [B, 3, H, W] to one logit per patch, [B, 1, H / 4, W / 4], and the features on the way.

    It is shown what blurring takes away beside the picture: left to find that by itself, it needs many times the steps.
    """

    def __init__(self, widths: tuple[int, int, int] = (24, 48, 96)) -> None:
        super().__init__()
        a, b, c = widths
        plan = [(6, a, 3, 1), (a, b, 4, 2), (b, c, 4, 2), (c, c, 3, 1)]
        layers = [nn.Conv2d(i, o, k, stride, 1) for i, o, k, stride in plan]
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList([nn.Identity(), *(nn.GroupNorm(8, o) for _, o, _, _ in plan[1:])])
        self.last = nn.Conv2d(c, 1, 3, padding=1)
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight, 0.2)
        nn.init.normal_(self.last.weight, std=1e-2)

    def forward(self, pictures: Tensor) -> tuple[Tensor, list[Tensor]]:
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x, features = torch.cat([pictures, 4 * (pictures - blurred)], 1), []
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.leaky_relu(norm(layer(x)), 0.2)
            features.append(x)
        return self.last(x), features


class DecoderRun:
    """A training under way: decoder, its average, discriminator, optimizers, step."""

    def __init__(self, settings: DecoderTraining, out: Path, device: torch.device, resume: bool) -> None:
        self.settings, self.path, self.device, self.step = settings, out / assemble.DECODER_CHECKPOINT, device, 0
        torch.manual_seed(settings.seed)
        vae: Any = assemble.frozen_vae(out).to(device)  # pyright: ignore[reportArgumentType]
        self.vae, self.decoder = vae, nn.ModuleList([vae.post_quant_conv, vae.decoder])
        self.decoder.requires_grad_(True).train()
        self.critic = Critic().to(device)
        self.ema = common.Ema(self.decoder, settings.ema)
        betas = (0.5, 0.99)
        # Not fused: on a CPU that kernel misreads moments that a checkpoint holds in another order than channels_last.
        self.optimizer = torch.optim.Adam(self.decoder.parameters(), lr=settings.lr, betas=betas)
        self.against = torch.optim.Adam(self.critic.parameters(), lr=settings.critic_lr, betas=betas)
        for network in (self.vae, self.critic):
            network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if resume and self.path.is_file():
            tree, facts = common.load_checkpoint(self.path)
            self.step = int(facts["step"])
            self.decoder.load_state_dict(tree["model"])
            self.critic.load_state_dict(tree["critic"])
            self.ema.load(tree["ema"])
            common.restore_optimizer(self.optimizer, tree["optimizer"])
            common.restore_optimizer(self.against, tree["against"])

    def save(self) -> None:
        state = {"model": self.decoder.state_dict(), "critic": self.critic.state_dict(), "ema": self.ema.shadow}
        moments = {n: common.optimizer_tensors(getattr(self, n)) for n in ("optimizer", "against")}
        common.save_checkpoint(self.path, {**state, **moments}, {"step": self.step})

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] of scaled latents [B, 4, h, w]."""
        return self.decoder[1](self.decoder[0](latents / self.vae.config.scaling_factor))

    def update(self, data: cache.Cache, pictures: pixels.Pictures, among: int, factor: float) -> dict[str, float]:
        """One step of both, on some of the first ``among`` pictures, with the learning rates' ``factor``."""
        settings, generator = self.settings, common.step_generator(self.settings.seed, self.step)
        rows = torch.randint(among, (settings.batch,), generator=generator).numpy()
        lay: Any = {"device": self.device, "memory_format": torch.channels_last}
        real = pixels.to_signed(pictures.pixels(rows)).to(**lay)
        thing = torch.from_numpy(pictures.masks(rows))[:, None].to(self.device)
        latents = torch.from_numpy(np.asarray(data.latents[rows], dtype=np.float32)).to(**lay)
        for optimizer, rate in ((self.optimizer, settings.lr), (self.against, settings.critic_lr)):
            optimizer.param_groups[0]["lr"] = rate * factor
        trusted = min(1.0, self.step / max(settings.alone, 1))
        with common.amp(self.device, settings.bf16):
            shown = self.decode(latents)
            told = self._teach_critic(real, shown.detach())
            kept, parts = self._loss(shown, real, thing, trusted)
        kept.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), settings.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.decoder, self.step)
        self.step += 1
        return {**parts, "critic": told, "norm": float(norm)}

    def _teach_critic(self, real: Tensor, shown: Tensor) -> float:
        """Hinge loss: logits above 1 for what was rendered, below -1 for what was decoded."""
        true, false = self.critic(real)[0].float(), self.critic(shown)[0].float()
        loss = (F.relu(1 - true).mean() + F.relu(1 + false).mean()) / 2
        loss.backward()
        self.against.step()
        self.against.zero_grad(set_to_none=True)
        return float(loss.detach())

    def _loss(self, shown: Tensor, real: Tensor, thing: Tensor, trusted: float) -> tuple[Tensor, dict[str, float]]:
        settings, last = self.settings, self.vae.decoder.conv_out.weight
        self.critic.requires_grad_(False)
        logits, features = self.critic(shown)
        with torch.no_grad():
            wanted = self.critic(real)[1]
        self.critic.requires_grad_(True)
        matching = torch.stack([(a - b).float().abs().mean() for a, b in zip(features, wanted, strict=True)]).mean()
        error = shown.float() - real
        faithful, parts = pixels.reconstruction(error, thing, settings.pixel)
        faithful = faithful + trusted * settings.matching * matching
        fooled = -logits.float().mean()
        ask: Any = {"retain_graph": True}
        ours, theirs = (torch.autograd.grad(x, last, **ask)[0].norm() for x in (faithful, fooled))
        weight = (ours / (theirs + 1e-4)).clamp(max=10.0).detach()
        total = faithful + trusted * settings.adversarial * weight * fooled
        return total, {**parts, "matching": float(matching.detach()), "weight": float(weight)}


def train_decoder(
    data: Path,
    out: Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    decay: float = 0.5,
    resume: bool = True,
    threads: int | None = None,
    device: str | None = None,
    settings: DecoderTraining = DecoderTraining(),
) -> Path:
    """Trains on the decoder of ``out``'s finished autoencoder and writes its average into ``out/vae``.

    Args:
        data: a data set's folder
        out: the run's folder (autoencoder, cache of latents, checkpoint, log)
        steps: ends the training at this step of the run, or
        minutes: ends it after this time of this session
        decay: the last fraction of the budget, over which the learning rates fall to 0
        resume: go on from ``out``'s checkpoint where there is one
        threads: of torch on a CPU
        device: as torch names it; the GPU if there is one where None

    Returns:
        the folder of the autoencoder
    """
    from shared.pretrain.toybox import dataset

    common.set_threads(threads)
    place, pictures = common.pick_device(device), dataset.load(data)
    cached = cache.build(out / "latents", pictures, assemble.frozen_vae(out), assemble.tokenizer_of(out), place)
    run = DecoderRun(settings, out, place, resume)
    fit(run, cached, pictures, common.Budget(steps=steps, minutes=minutes, decay=decay, warmup=100), out)
    return finish(run, pictures, out)


def fit(run: DecoderRun, data: cache.Cache, pictures: pixels.Pictures, budget: common.Budget, out: Path) -> None:
    """The loop; checkpoints by the clock."""
    settings, among, log = run.settings, pixels.train_count(pictures), common.Log(out / "decoder_log.jsonl")
    common.fit(
        run,
        lambda factor: run.update(data, pictures, among, factor),
        budget,
        log,
        settings.log_every,
        settings.save_minutes,
    )


@torch.no_grad()
def finish(run: DecoderRun, pictures: pixels.Pictures, out: Path) -> Path:
    """Writes ``out/vae`` with the averaged decoder, and measures it on held-out pictures."""
    vae: Any = assemble.frozen_vae(out).to(run.device)  # pyright: ignore[reportArgumentType]
    run.ema.copy_to(nn.ModuleList([vae.post_quant_conv, vae.decoder]))
    decibels = pixels.psnr(vae, pictures.pixels(slice(pixels.train_count(pictures), None)))
    common.Log(out / "decoder_log.jsonl").write(step=run.step, psnr=decibels)
    folder = out / assemble.VAE_FOLDER
    vae.save_pretrained(str(folder))
    return folder
