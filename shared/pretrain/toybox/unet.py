"""Trains the text model and the U-Net together on cached latents with v-prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from shared.optimizers import OptimizerPart
from shared.pretrain.batch_shares import BatchShares
from shared.pretrain.prefetch import Prefetch
from shared.pretrain.run_task import RunSettings, run_task
from shared.pretrain.task import Compute, PretrainTask, decay_groups
from shared.pretrain.toybox import latent_cache as cache
from shared.pretrain.toybox import latent_reader as reader
from shared.pretrain.toybox import models
from shared.pretrain.toybox.denoising_loss import DenoisingBatch, UnetTraining, draw_batch, v_loss
from shared.pretrain.toybox.run_folder import frozen_vae, save_snapshot, tokenizer_of, training_folder
from shared.train.averages import Averages
from shared.train.budget import Budget
from shared.train.task import Update, Updates
from shared.trainable import TrainableGroup

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class UnetTask(PretrainTask):
    """The task that trains the denoiser.

    Args:
        budget: determines the learning rate and, through it, the weight of the reading losses (see `reads`)
        workers: the number of threads, each of which takes an equal share of every batch. Results are bit-identical
            only for the same number of threads.
        reads: the reader whose losses teach the meaning of words that describe shape. If None, the squared error is the
            only loss.
    """

    helpers = frozenset({"probe"})

    def __init__(
        self,
        settings: UnetTraining,
        data: cache.Cache,
        out: Path,
        budget: Budget,
        compute: Compute,
        workers: int = 1,
        reads: reader.Reader | None = None,
    ) -> None:
        if settings.batch % workers:
            raise ValueError(f"a batch of {settings.batch} cannot be split equally among {workers} workers")
        self.settings, self.data, self.out, self.budget, self.compute = settings, data, out, budget, compute
        self.seed, self.batch_size, self.reads = settings.seed, settings.batch, reads
        self.shares = BatchShares(workers)
        self.facts = {"seed": settings.seed, "batch": settings.batch, "sizes": settings.sizes}
        torch.manual_seed(settings.seed)
        tokenizer = tokenizer_of(out)
        self.denoiser = models.build_denoiser(tokenizer, settings.sizes).to(compute.device).train()
        if compute.device.type == "cpu":
            self.denoiser.text_encoder.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
        models.lay_out(self.denoiser.unet, compute)
        self.drawn = Prefetch(self._draw, compute.device)
        self.ema = self.averages = Averages(dict(self.denoiser.named_parameters()), settings.ema)
        self.probe = reader.Probe(self.denoiser.unet).to(compute.device) if reads is not None else None
        self.modules = {"model": self.denoiser, **({} if self.probe is None else {"probe": self.probe})}
        unclipped = settings.optimizer.model_copy(update={"max_grad_norm": None})
        self.optimizers: dict[str, OptimizerPart] = {"probe": unclipped, "main": settings.optimizer}
        self.bars = models.alphas_bar().to(compute.device)
        self.empty = empty_prompt(tokenizer)

    def groups(self) -> dict[str, list[TrainableGroup]]:
        settings = self.settings
        main = {"main": decay_groups(self.denoiser, settings.lr, settings.optimizer.weight_decay)}
        if self.probe is None:
            return main
        return {"probe": [TrainableGroup("probe", list(self.probe.parameters()), settings.lr, 0.0)], **main}

    def updates(self, step: int, micro: int) -> Updates:
        """Yields one loss."""
        yield Update(self.loss(self.drawn(step), self.reading(step)))

    def _draw(self, step: int) -> DenoisingBatch:
        return draw_batch(self.data, self.empty, self.settings, step).to(self.compute.device)

    def reading(self, step: int) -> float:
        """Returns the weight of the reading losses. It is 1 at the peak learning rate and falls with the rate, reaching
        0 when the rate is `read_until` times the peak."""
        optimizer, until = self.settings.optimizer, self.settings.read_until
        factor = optimizer.factor(step, self.budget.spent(step, optimizer.warmup))
        return max(0.0, factor - until) / (1 - until)

    def loss(self, batch: DenoisingBatch, reading: float = 0.0) -> Tensor:
        """Computes the batch's mean loss. Equal shares of the batch are processed in parallel."""

        def of(share: DenoisingBatch) -> Tensor:
            with self.compute.autocast():
                return v_loss(self.denoiser, share, self.bars, self.settings, self.reads, self.probe, reading)

        trained = [p for module in self.modules.values() for p in module.parameters() if p.requires_grad]
        return self.shares.mean_loss(of, batch.split(self.shares.workers), trained)

    def after_step(self, step: int, pictures: int) -> None:
        """Saves the averaged parameters every `snapshot_steps` steps, for the training curve."""
        if step % self.settings.snapshot_steps == 0:
            facts: dict[str, Any] = {"step": step, "sizes": self.settings.sizes, "pictures": pictures}
            save_snapshot(training_folder(self.out, "unet"), self.ema.state_dict(), facts)


def empty_prompt(tokenizer: CLIPTokenizer) -> Tensor:
    """Returns the token ids of the empty caption, [L]. They replace the ids of dropped captions."""
    return torch.from_numpy(cache.tokenize(tokenizer, [[""]])[0, 0].astype(np.int64))


def train_unet(data: Path, out: Path, run: RunSettings, settings: UnetTraining = UnetTraining()) -> Path:
    """Trains the text model and the U-Net on latents from the finished autoencoder in the run's folder `out`.

    On a CPU, each of `run.threads` threads takes a share of the batch. Results are bit-identical only for the same
    number of threads.

    Returns:
        the folder with the checkpoint and the log. `shared.pretrain.toybox.assemble.assemble(out)` turns the checkpoint
        into a pipeline folder.
    """
    from shared.pretrain.toybox import dataset

    folder, workers = training_folder(out, "unet"), run.threads or torch.get_num_threads()
    compute = run.compute()
    if compute.device.type == "cpu":
        torch.set_num_threads(1)
    else:
        workers = 1
    pictures, tokenizer = dataset.load(data), tokenizer_of(out)
    cached = cache.build(out / "latents", pictures, frozen_vae(out), tokenizer, compute.device)
    reads = reader.train_reader(cached, out, replace(run, threads=None)) if any(settings.reading) else None
    budget, channels = run.budget(), cached.latents.shape[1]
    settings = replace(settings, unet=replace(settings.unet, latent_channels=channels))
    run_task(UnetTask(settings, cached, out, budget, compute, workers, reads), run, folder, budget=budget)
    return folder
