"""What is learned: the losses of the recognizer, the identity encoder and the CLIP, each over one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from shared.metrics.scores import similarities
from shared.pretrain.evaluators.augment import augment
from shared.pretrain.evaluators.data import IdentityPictures, Pictures, accents_as_shown
from shared.pretrain.toybox import common
from shared.toybox.evaluators import clip as clips
from shared.toybox.evaluators.convnet import adopt_state, save_model
from shared.toybox.evaluators.identity import HIDDEN, IdentityConfig, IdentityEncoder
from shared.toybox.evaluators.recognizer import ATTRIBUTES, Recognizer, RecognizerConfig


def _through(data: Pictures | IdentityPictures) -> tuple[str, ...]:
    return () if data.reconstructions is None else ("--reconstructions FILE",)


class RecognizerTask:
    """Cross-entropy of every attribute; what a picture's label leaves open (-1) is not counted."""

    def __init__(self, data: Pictures, batch_size: int, seed: int, config: RecognizerConfig | None = None) -> None:
        torch.manual_seed(seed)
        self.data, self.batch_size = data, batch_size
        self.config = config or RecognizerConfig(values=data.values)
        self.recognizer = Recognizer(self.config)
        self.flags = _through(data)
        self.module: nn.Module = self.recognizer

    def loss(self, generator: Generator, device: torch.device, autocast: bool) -> dict[str, Tensor]:
        """One cross-entropy per attribute, and one for where things are."""
        rows, pixels = self.data.draw(generator, self.batch_size)
        pixels = augment(pixels, generator).to(device)
        with common.amp(device, autocast):
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
        """Takes over a written recognizer."""
        return adopt_state(self.module, out)


class IdentityTask:
    """Supervised contrastive loss; a batch holds groups of one class and palette, in each several things in several views.

    While training, what the renderer drew the individual from is read off the layer before the embedding (not kept).
    `start`: a recognizer, whose trunk the encoder takes over as it is: only what follows it is learned (three times
    faster). `thaw`: the trunk is learned too, for a second round.
    """

    def __init__(
        self,
        data: IdentityPictures,
        batch_size: int,
        seed: int,
        config: IdentityConfig | None = None,
        start: Recognizer | None = None,
        thaw: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        self.data, self.batch_size = data, batch_size
        self.config = config or IdentityConfig()
        self.encoder = IdentityEncoder(self.config)
        if start is not None:
            self.encoder.locator.take_over(start.trunk)
            self.encoder.trunk.load_state_dict(start.trunk.state_dict())
            self.encoder.trunk.requires_grad_(thaw)
        self.frozen = start is not None and not thaw
        self.flags = (*_through(data), *(["--thaw"] if thaw else []))
        self.kinds = nn.Linear(HIDDEN, int(data.kinds.max()) + 1)
        self.numbers = nn.Linear(HIDDEN, data.numbers.shape[1])
        self.module: nn.Module = nn.ModuleList([self.encoder, self.kinds, self.numbers])

    def loss(self, generator: Generator, device: torch.device, autocast: bool) -> dict[str, Tensor]:
        """Contrastive over the whole batch, the same within the groups of hard negatives, and the readings."""
        self.encoder.trunk.train(not self.frozen)
        drawn = self.data.draw(generator, self.batch_size)
        pixels = augment(drawn.pixels, generator).to(device)
        with common.amp(device, autocast):
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
        """Takes over a written encoder; what is read off while training begins anew."""
        return adopt_state(self.encoder, out)


class ClipTask:
    """CLIP's loss, and while training a linear reading of every attribute from the picture's embedding (not kept)."""

    def __init__(
        self, data: Pictures, batch_size: int, seed: int, tokenizer: Any, config: clips.ClipConfig | None = None
    ) -> None:
        torch.manual_seed(seed)
        config = config or clips.ClipConfig()
        self.data, self.batch_size, self.tokenizer = data, batch_size, tokenizer
        self.processor = clips.new_processor(config, tokenizer)
        model = clips.new_clip(config, tokenizer)
        self.flags = _through(data)
        heads = {f"head_{name}": nn.Linear(config.dimensions, len(v)) for name, v in data.values.items()}
        self.model, self.heads = model, nn.ModuleDict(heads)
        self.module: nn.Module = nn.ModuleDict({"clip": model, "heads": self.heads})

    def loss(self, generator: Generator, device: torch.device, autocast: bool) -> dict[str, Tensor]:
        """The contrastive term and the mean of the readings."""
        rows, pixels = self.data.draw(generator, self.batch_size)
        pixels = augment(pixels, generator).to(device)
        texts = self.data.draw_captions(rows, generator)
        with common.amp(device, autocast):
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
        """Writes the transformers folder."""
        clips.save_clip(self.model, self.processor, out)

    def adopt(self, out: Path) -> bool:
        """Takes over a written CLIP; what is read off while training begins anew."""
        return adopt_state(self.model, out)


def retrieve(queries: Tensor, gallery: Sequence[Tensor]) -> Tensor:
    """The index `[Q]` of the entry that each query `[Q, D]` is most similar to; `gallery` as in `similarities`."""
    return similarities(queries, gallery).argmax(1)


def contrastive_loss(embeddings: Tensor, labels: Tensor, temperature: float = 0.1) -> Tensor:
    """Supervised contrastive loss (arXiv 2004.11362, eq. 2) of unit vectors `[B, D]` with labels `[B]`; scalar.

    A row without a positive in the batch is left out.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (embeddings @ embeddings.T / temperature).masked_fill(own, -torch.inf)
    log_p = logits.log_softmax(1).masked_fill(own, 0.0)
    positive = (labels[:, None] == labels[None]) & ~own
    count = positive.sum(1)
    return -((log_p * positive).sum(1)[count > 0] / count[count > 0]).mean()
