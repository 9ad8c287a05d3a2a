"""Text model and U-Net, trained together on cached latents with v-prediction."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.pretrain.toybox import assemble, common, models
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import latent_reader as reader

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class UnetTraining:
    """Settings of the denoiser's training; ``lr`` is AdamW's peak rate; ``t_uniform`` and ``t_mean`` see ``draw_times``;
    ``thing_weight``: how much more the loss counts where things are (a fifth of a picture, and all of what is hard).
    ``reading``, ``probing``: the weights of class, view and accessory that must be seen in the guess and in the middle
    of the U-Net (`reader`), at the full learning rate; both fall to 0 with the rate, where it is ``read_until`` of its
    peak.
    """

    unet: models.UnetSize = field(default_factory=models.UnetSize)
    text: models.TextSize = field(default_factory=models.TextSize)
    batch: int = 32
    lr: float = 8e-4
    weight_decay: float = 1e-2
    caption_dropout: float = 0.1
    t_uniform: float = 0.1
    t_mean: float = 0.4
    thing_weight: float = 3.0
    reading: tuple[float, float, float] = (0.01, 0.04, 0.05)
    probing: tuple[float, float, float] = (0.05, 0.1, 0.08)
    read_until: float = 0.3
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    bf16: bool = True
    warmup: int = 200
    save_minutes: float = 3.0
    snapshot_steps: int = 1500
    log_every: int = 100


class PlainAttention:
    """Attention as two batched products and a softmax, for diffusers' ``set_attn_processor``.

    The same function as the fused kernel, whose backward pass on a CPU takes a fifth of a training step here.
    """

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: object
    ) -> Tensor:
        """[B, L, D] queries over themselves or over [B, M, C]; returns [B, L, D]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (self._split(x, attn.heads) for x in projected)
        with torch.autocast(q.device.type, enabled=False):
            mixed = ((q @ k.transpose(-1, -2)) * attn.scale).softmax(-1) @ v
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def _split(x: Tensor, heads: int) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def alphas_bar() -> Tensor:
    """The schedule's cumulative products, float32 [1000]."""
    return models.build_scheduler().alphas_cumprod


@dataclass(frozen=True)
class Draw:
    """One step's random inputs, on the training device."""

    latents: Tensor  # [B, 4, H, W], scaled
    ids: Tensor  # [B, L] token ids, those of "" where the caption is dropped
    noise: Tensor  # [B, 4, H, W]
    t: Tensor  # [B] in [0, 1000), stratified over the batch
    weight: Tensor  # [B, H, W] of the loss, 1 on average
    said: Tensor  # [B, 3] what the caption says (`captions.said`), -1 for nothing
    again: Tensor  # [B, 4, H, W] noise that the guess gets before it is read
    level: Tensor  # [B] how much of it, as t

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """All of them, in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def to(self, device: torch.device) -> Draw:
        """The same on ``device``."""
        return Draw(*(x.to(device) for x in self.fields))

    def split(self, count: int) -> list[Draw]:
        """``count`` equal shares, each with every ``count``-th row (so that each has all sorts of t)."""
        return [Draw(*(x[i::count] for x in self.fields)) for i in range(count)]


def draw(data: cache.Cache, empty: Tensor, settings: UnetTraining, step: int) -> Draw:
    """The batch of a step; depends on seed and step alone (and on the cache's content)."""
    g, b = common.step_generator(settings.seed, step), settings.batch
    index = torch.randint(len(data), (b,), generator=g).numpy()
    variant = torch.randint(data.tokens.shape[1], (b,), generator=g).numpy()
    latents = torch.from_numpy(np.asarray(data.latents[index], dtype=np.float32))
    ids = torch.from_numpy(data.tokens[index, variant].astype(np.int64))
    dropped = torch.rand(b, generator=g) < settings.caption_dropout
    ids = torch.where(dropped[:, None], empty[None], ids)
    noise = torch.randn(latents.shape, generator=g)
    weight = 1 + (settings.thing_weight - 1) * torch.from_numpy(data.covered[index].astype(np.float32)) / 255
    times = draw_times(b, settings.t_uniform, settings.t_mean, g)
    said = torch.from_numpy(data.said[index, variant].astype(np.int64)).masked_fill(dropped[:, None], -1)
    return Draw(latents, ids, noise, times, weight / weight.mean(), said, *reader.draw_noise(latents, g))


def draw_times(count: int, uniform: float, mean: float, generator: torch.Generator) -> Tensor:
    """Timesteps [count] in [0, 1000): logit-normal (arXiv 2403.03206, section 3.1), a fraction of them ``uniform``.

    Most of what a caption decides is decided in the middle and, for ``mean`` > 0, in more noise than that, where more
    is drawn. Stratified over the batch.
    """
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    plain = torch.rand(count, generator=generator) < uniform
    share = torch.where(plain, u, (torch.special.ndtri(u.double().clamp(1e-6, 1 - 1e-6)) + mean).sigmoid().float())
    return (share * models.TRAIN_TIMESTEPS).long().clamp(max=models.TRAIN_TIMESTEPS - 1)


def v_loss(
    denoiser: nn.Module,
    inputs: Draw,
    bars: Tensor,
    settings: UnetTraining,
    reads: reader.Reader | None = None,
    probe: reader.Probe | None = None,
    reading: float = 0.0,
) -> Tensor:
    """Mean squared error of v = alpha * noise - sigma * x (arXiv 2202.00512), higher where things are; and ``reading``
    times what ``reads`` cannot read off the guess of x, as the settings weigh it.
    """
    bar = bars[inputs.t].view(-1, 1, 1, 1)
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    noisy = alpha * inputs.latents + sigma * inputs.noise
    target = alpha * inputs.noise - sigma * inputs.latents
    with common.amp(noisy.device, settings.bf16):
        predicted = denoiser(noisy, inputs.t, inputs.ids)
    predicted = predicted.float()
    loss = (inputs.weight[:, None] * (predicted - target).square()).mean()
    if reads is None or not reading:
        return loss
    guess = alpha * noisy - sigma * predicted
    with common.amp(noisy.device, settings.bf16):
        unread = reads.loss(guess, inputs.said, inputs.again, inputs.level, bars, settings.reading)
    if probe is not None:
        unread = unread + probe.loss(inputs.said, settings.probing)
    return loss + reading * unread


def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))


class UnetRun:
    """A training under way: networks, average, optimizer, step.

    ``workers`` threads take equal shares of each batch. On a CPU that other work uses too, this is far faster than as
    many threads inside each operation: shares wait for each other once a step, not once an operation.
    """

    def __init__(
        self,
        settings: UnetTraining,
        tokenizer: CLIPTokenizer,
        out: Path,
        device: torch.device,
        resume: bool,
        workers: int = 1,
        reads: reader.Reader | None = None,
    ) -> None:
        if settings.batch % workers:
            raise ValueError(f"a batch of {settings.batch} cannot be shared equally by {workers} workers")
        self.settings, self.out, self.device, self.step = settings, out, device, 0
        self.pictures, self.workers, self.reads = 0, workers, reads
        self.pool = _pool(workers) if workers > 1 else None
        torch.manual_seed(settings.seed)
        self.sizes = {"text": asdict(settings.text), "unet": asdict(settings.unet)}
        path = out / assemble.UNET_CHECKPOINT
        tree, facts = common.load_checkpoint(path) if resume and path.is_file() else ({}, {})
        if tree:
            self.sizes, self.step, self.pictures = facts["sizes"], int(facts["step"]), int(facts["pictures"])
        self.denoiser = models.build_denoiser(tokenizer, self.sizes).to(device).train()
        if device.type == "cpu":
            self.denoiser.text_encoder.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
            self.denoiser.unet.set_attn_processor(PlainAttention())  # pyright: ignore[reportCallIssue]
        self.ema = common.Ema(self.denoiser, settings.ema)
        groups = common.parameter_groups(self.denoiser, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.99), fused=True)
        self.trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        self.probe = reader.Probe(self.denoiser.unet).to(device) if reads is not None else None
        if self.probe is not None:
            self.optimizer.add_param_group({"params": list(self.probe.parameters()), "weight_decay": 0.0})
            self.trained += self.probe.parameters()
        if tree:
            self.denoiser.load_state_dict(tree["model"])
            self.ema.load(tree["ema"])
        if self.probe is not None and "probe" in tree:
            self.probe.load_state_dict(tree["probe"])
        if "optimizer" in tree:  # adopted weights come without
            common.restore_optimizer(self.optimizer, tree["optimizer"])
        self.bars = alphas_bar().to(device)
        ids = cache.tokenize(tokenizer, [[""]])[0, 0]
        self.empty = torch.from_numpy(ids.astype(np.int64))

    def facts(self) -> dict[str, Any]:
        return {"step": self.step, "sizes": self.sizes, "pictures": self.pictures}

    def save(self) -> None:
        tensors = {
            "model": self.denoiser.state_dict(),
            "ema": self.ema.shadow,
            "optimizer": common.optimizer_tensors(self.optimizer),
            **({} if self.probe is None else {"probe": self.probe.state_dict()}),
        }
        common.save_checkpoint(self.out / assemble.UNET_CHECKPOINT, tensors, self.facts())

    def snapshot(self) -> None:
        """Keeps the average alone, in fp16, for the curve over training."""
        average = {name: tensor.half() for name, tensor in self.ema.shadow.items()}
        path = self.out / "snapshots" / f"unet-{self.step:07d}.safetensors"
        common.save_checkpoint(path, {"ema": average}, self.facts())

    def update(self, data: cache.Cache, factor: float) -> tuple[float, float]:
        """One step with the learning rate's ``factor``; returns loss and gradient norm."""
        inputs = draw(data, self.empty, self.settings, self.step).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * factor
        kept = max(0.0, factor - self.settings.read_until) / (1 - self.settings.read_until)
        loss = self.backward(inputs, kept)
        norm = torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), self.settings.clip)
        if torch.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.denoiser, self.step)
        self.step += 1
        self.pictures += self.settings.batch
        return loss, float(norm)

    def backward(self, inputs: Draw, reading: float = 0.0) -> float:
        """Gradients of the batch's mean loss, from ``workers`` equal shares side by side, summed in order."""

        def share(part: Draw) -> tuple[float, Sequence[Tensor]]:
            loss = v_loss(self.denoiser, part, self.bars, self.settings, self.reads, self.probe, reading)
            gradients = torch.autograd.grad(loss / self.workers, self.trained, allow_unused=True)
            return float(loss.detach()) / self.workers, gradients

        parts = inputs.split(self.workers)
        done = [share(parts[0])] if self.pool is None else list(self.pool.map(share, parts))
        used = [i for i, gradient in enumerate(done[0][1]) if gradient is not None]  # the probe rests without reading
        gradients = [done[0][1][i] for i in used]
        for _, more in done[1:]:
            torch._foreach_add_(gradients, [more[i] for i in used])
        for i, gradient in zip(used, gradients, strict=True):
            self.trained[i].grad = gradient
        return sum(loss for loss, _ in done)


def train_unet(
    data: Path,
    out: Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    decay: float = 0.0,
    resume: bool = True,
    threads: int | None = None,
    device: str | None = None,
    settings: UnetTraining = UnetTraining(),
) -> Path:
    """Trains text model and U-Net on the latents of ``out``'s finished autoencoder.

    Args:
        data: a data set's folder
        out: the run's folder (autoencoder, tokenizer, cache, checkpoint, snapshots, log)
        steps: ends the training at this step of the run, or
        minutes: ends it after this time of this session
        decay: the last fraction of the budget, over which the learning rate falls to 0; 0 to go on later
        resume: go on from ``out``'s checkpoint where there is one
        threads: on a CPU, each with its share of the batch; same bits only for the same number
        device: as torch names it; the GPU if there is one where None

    Returns:
        the checkpoint; ``shared.toybox.weights.assemble(out)`` makes the pipeline folder of it
    """
    from shared.pretrain.toybox import dataset

    place, tokenizer = common.pick_device(device), assemble.tokenizer_of(out)
    workers = (threads or torch.get_num_threads()) if place.type == "cpu" else 1
    common.set_threads(1 if place.type == "cpu" else threads)
    cached = cache.build(out / "latents", dataset.load(data), assemble.frozen_vae(out), tokenizer, place)
    reads = reader.train_reader(cached, out, alphas_bar().to(place), place) if any(settings.reading) else None
    run = UnetRun(settings, tokenizer, out, place, resume, workers, reads)
    budget = common.Budget(steps=steps, minutes=minutes, decay=decay, warmup=settings.warmup)
    fit(run, cached, budget, common.Log(out / "unet_log.jsonl"))
    return out / assemble.UNET_CHECKPOINT


def fit(run: UnetRun, data: cache.Cache, budget: common.Budget, log: common.Log) -> None:
    """The loop, with checkpoints by the clock and snapshots of the average by the step."""
    settings, started = run.settings, time.time()
    saved, losses, mark = started, [], started
    while budget.progress(run.step, time.time() - started) < 1:
        factor = budget.rate(run.step, time.time() - started)
        loss, norm = run.update(data, factor)
        losses.append(loss)
        now = time.time()
        if run.step % settings.log_every == 0:
            rate = len(losses) * settings.batch / (now - mark)
            mean = sum(losses) / len(losses)
            facts = {"loss": round(mean, 5), "norm": round(norm, 4), "lr": settings.lr * factor}
            log.write(step=run.step, pictures=run.pictures, **facts, per_s=round(rate, 1))
            losses, mark = [], now
        if run.step % settings.snapshot_steps == 0:
            run.snapshot()
        if now - saved > settings.save_minutes * common.SECONDS_PER_MINUTE:
            run.save()
            saved = now
    run.save()
