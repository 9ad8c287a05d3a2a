"""Defines the tasks that train the recognizer, the identity encoder and CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from shared.metrics.scores import similarities
from shared.optimizers import AdamW
from shared.pretrain.evaluators.augment import augment
from shared.pretrain.evaluators.data import IdentityPictures, Pictures, accents_as_shown
from shared.pretrain.task import Compute, PretrainTask, decay_groups
from shared.toybox.evaluators import clip as clips
from shared.toybox.evaluators.convnet import adopt_state, save_model
from shared.toybox.evaluators.identity import HIDDEN, IdentityConfig, IdentityEncoder
from shared.toybox.evaluators.recognizer import ATTRIBUTES, Recognizer, RecognizerConfig
from shared.train.loop import generator
from shared.train.task import Update, Updates
from shared.trainable import TrainableGroup

_ADAMW = AdamW(betas=(0.9, 0.98), weight_decay=0.05, warmup=100, schedule="linear", decay=0.7, max_grad_norm=5.0)


@dataclass(frozen=True)
class EvaluatorTraining:
    """Settings for training an evaluator.

    `lr` is the peak learning rate. `thaw` is only for the identity encoder. It starts a second round of training, in
    which the trunk taken from the recognizer is also trained."""

    batch_size: int = 128
    lr: float = 2e-3
    optimizer: AdamW = _ADAMW
    seed: int = 0
    thaw: bool = False


class EvaluatorTask(PretrainTask):
    """A task that trains an evaluator."""

    flags: tuple[str, ...]  # flags that the model card appends to the training command

    def _set_up(self, module: nn.Module, settings: EvaluatorTraining, compute: Compute) -> None:
        self.module, self.settings, self.compute = module.to(compute.device).train(), settings, compute
        self.seed, self.batch_size = settings.seed, settings.batch_size
        self.modules, self.optimizers = {"model": self.module}, {"main": settings.optimizer}
        self.facts = {"seed": settings.seed, "batch_size": settings.batch_size}

    def groups(self) -> dict[str, list[TrainableGroup]]:
        return {"main": decay_groups(self.module, self.settings.lr, self.settings.optimizer.weight_decay)}

    def updates(self, step: int, micro: int) -> Updates:
        """Yields one loss, which is the sum of the terms."""
        terms = self.terms(generator(self.seed, step, micro))
        yield Update(torch.stack(list(terms.values())).sum(), parts={k: v.detach() for k, v in terms.items()})

    def terms(self, draws: Generator) -> dict[str, Tensor]:
        """Returns named scalars whose sum is minimised."""
        raise NotImplementedError

    def export(self, out: Path) -> None:
        """Writes the current weights in fp16."""
        raise NotImplementedError

    def adopt(self, out: Path) -> bool:
        """Loads weights written by `export`. Returns False if the weights have a different architecture."""
        raise NotImplementedError


def flags_of(data: Pictures | IdentityPictures) -> tuple[str, ...]:
    """Returns the flags that make the model card's training command use these pictures."""
    return () if data.reconstructions is None else ("--reconstructions FILE",)


class RecognizerTask(EvaluatorTask):
    """Minimises the cross-entropy of every attribute, and of a map that shows where things are. Undefined labels (-1)
    are ignored."""

    def __init__(
        self, data: Pictures, settings: EvaluatorTraining, compute: Compute, config: RecognizerConfig | None = None
    ) -> None:
        torch.manual_seed(settings.seed)
        self.data, self.flags = data, flags_of(data)
        self.config = config or RecognizerConfig(values=data.values)
        self.recognizer = Recognizer(self.config)
        self._set_up(self.recognizer, settings, compute)

    def terms(self, draws: Generator) -> dict[str, Tensor]:
        """Returns one cross-entropy per attribute, and one for the things' positions."""
        device = self.compute.device
        rows, pixels = self.data.draw(draws, self.batch_size)
        pixels = augment(pixels, draws).to(device)
        with self.compute.autocast():
            logits, where = self.recognizer.read(pixels)
        labels = {name: torch.from_numpy(self.data.labels[name][rows]).to(device) for name in ATTRIBUTES}
        terms = {
            name: F.cross_entropy(logits[name].float(), labels[name], ignore_index=-1, label_smoothing=0.02)
            for name in ATTRIBUTES
            if bool((labels[name] >= 0).any())
        }
        covered = F.adaptive_avg_pool2d(self.data.masks(rows), where.shape[2:]).to(device)  # pyright: ignore[reportArgumentType]
        return {**terms, "where": F.binary_cross_entropy_with_logits(where, covered)}

    def export(self, out: Path) -> None:
        """Writes the recognizer."""
        save_model(self.module, self.config, out)

    def adopt(self, out: Path) -> bool:
        """Loads a recognizer written by `export`."""
        return adopt_state(self.module, out)


class IdentityTask(EvaluatorTask):
    """Minimises the supervised contrastive loss. A batch consists of groups. Each group shows several things of one
    class and palette, and each thing is shown in several views.

    During training, additional heads on the layer before the embedding predict the parameters from which the renderer
    drew each thing. These heads are discarded after training.

    Args:
        start: a recognizer whose trunk the encoder takes over. Unless `thaw` is set, the trunk stays unchanged and only
            the layers after it are trained, which is three times as fast.
    """

    def __init__(
        self,
        data: IdentityPictures,
        settings: EvaluatorTraining,
        compute: Compute,
        config: IdentityConfig | None = None,
        start: Recognizer | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.data = data
        self.config = config or IdentityConfig()
        self.encoder = IdentityEncoder(self.config)
        if start is not None:
            self.encoder.locator.take_over(start.trunk)
            self.encoder.trunk.load_state_dict(start.trunk.state_dict())
            self.encoder.trunk.requires_grad_(settings.thaw)
        self.frozen = start is not None and not settings.thaw
        self.flags = (*flags_of(data), *(["--thaw"] if settings.thaw else []))
        self.kinds = nn.Linear(HIDDEN, int(data.kinds.max()) + 1)
        self.numbers = nn.Linear(HIDDEN, data.numbers.shape[1])
        self._set_up(nn.ModuleList([self.encoder, self.kinds, self.numbers]), settings, compute)

    def terms(self, draws: Generator) -> dict[str, Tensor]:
        """Returns the contrastive losses over the batch and within groups of hard negatives, and the losses of the
        predicted parameters."""
        self.encoder.trunk.train(not self.frozen)
        device = self.compute.device
        drawn = self.data.draw(draws, self.batch_size)
        pixels = augment(drawn.pixels, draws).to(device)
        with self.compute.autocast():
            hidden = self.encoder.hidden(pixels)
        hidden, labels = hidden.float(), drawn.labels.to(device)
        embeddings, size = F.normalize(self.encoder.last(hidden), dim=1), len(labels) // drawn.groups
        hard = [contrastive_loss(e, y) for e, y in zip(embeddings.split(size), labels.split(size), strict=True)]
        kinds = torch.from_numpy(self.data.kinds).to(device)[labels]
        numbers = accents_as_shown(torch.from_numpy(self.data.numbers)[drawn.labels], drawn.channels).to(device)
        known = ~numbers.isnan()
        terms = {"all": contrastive_loss(embeddings, labels), "hard": torch.stack(hard).mean()}
        errors = (self.numbers(hidden) - numbers.nan_to_num()).square() * known
        terms["numbers"] = errors.sum() / known.sum().clamp(min=1)
        if bool((kinds >= 0).any()):
            terms["kinds"] = 0.5 * F.cross_entropy(self.kinds(hidden), kinds, ignore_index=-1)
        return terms

    def export(self, out: Path) -> None:
        """Writes the encoder."""
        save_model(self.encoder, self.config, out)

    def adopt(self, out: Path) -> bool:
        """Loads an encoder written by `export`. The heads used only in training are initialised again."""
        return adopt_state(self.encoder, out)


class ClipTask(EvaluatorTask):
    """Minimises CLIP's loss, and the loss of linear heads that predict every attribute from the picture's embedding.
    The heads are discarded after training.
    """

    def __init__(
        self,
        data: Pictures,
        settings: EvaluatorTraining,
        compute: Compute,
        tokenizer: Any,
        config: clips.ClipConfig | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        config = config or clips.ClipConfig()
        self.data, self.tokenizer = data, tokenizer
        self.processor = clips.new_processor(config, tokenizer)
        model = clips.new_clip(config, tokenizer)
        self.flags = flags_of(data)
        heads = {f"head_{name}": nn.Linear(config.dimensions, len(v)) for name, v in data.values.items()}
        self.model, self.heads = model, nn.ModuleDict(heads)
        self._set_up(nn.ModuleDict({"clip": model, "heads": self.heads}), settings, compute)

    def terms(self, draws: Generator) -> dict[str, Tensor]:
        """Returns the contrastive term and the mean loss of the attribute heads."""
        device = self.compute.device
        rows, pixels = self.data.draw(draws, self.batch_size)
        pixels = augment(pixels, draws).to(device)
        texts = self.data.draw_captions(rows, draws)
        with self.compute.autocast():
            images = clips.image_features(self.model, pixels, len(pixels))
            words = clips.text_features(self.model, self.tokenizer, texts, len(texts))
        terms = {"clip": clips.contrastive_loss(images, words, self.model.logit_scale)}
        readings = []
        for name in ATTRIBUTES:
            label = torch.from_numpy(self.data.labels[name][rows]).to(device)
            if bool((label >= 0).any()):
                readings.append(F.cross_entropy(10.0 * self.heads[f"head_{name}"](images), label, ignore_index=-1))
        return {**terms, "readings": 0.3 * torch.stack(readings).mean()}

    def export(self, out: Path) -> None:
        """Writes CLIP as a transformers folder."""
        clips.save_clip(self.model, self.processor, out)

    def adopt(self, out: Path) -> bool:
        """Loads a CLIP model written by `export`. The attribute heads are initialised again."""
        return adopt_state(self.model, out)


def retrieve(queries: Tensor, gallery: Sequence[Tensor]) -> Tensor:
    """Returns the index of the gallery entry that is most similar to each query, `[Q]`.

    Args:
        queries: `[Q, D]`
        gallery: as in `similarities`
    """
    return similarities(queries, gallery).argmax(1)


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Returns the supervised contrastive loss (arXiv 2004.11362, eq. 2), a scalar. Rows without a positive are left
    out.

    Args:
        embeddings: unit vectors `[B, D]`
        labels: `[B]`
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (embeddings @ embeddings.T / temperature).masked_fill(own, -torch.inf)
    log_p = logits.log_softmax(1).masked_fill(own, 0.0)
    positive = (labels[:, None] == labels[None]) & ~own
    count = positive.sum(1)
    return -((log_p * positive).sum(1)[count > 0] / count[count > 0]).mean()
