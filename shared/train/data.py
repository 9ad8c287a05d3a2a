"""From examples to batches: order, captions, augmentation, and the caches of what does not vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.backbones.protocol import Backbone
from shared.prompts import expand
from shared.recipe.schema import Recipe
from shared.sampling.sampler import images_per_batch
from shared.train.loop import generator
from shared.types import Batch, Example

_ENCODE_PIXELS = 2**18  # at most, per pass of the autoencoder while caching: one picture of 512x512
#: Steps that never occur: streams for the order of epochs, for cached variants, and for what is done once.
_ORDER, _VARIANT, _FIXED = 2**40, 2**41, 2**43


@dataclass(frozen=True)
class Row:
    """One example ready to be batched: the mean and spread of its latents, its masks at latent size."""

    example: Example  # without pixels once its latents are cached
    mean: Tensor  # [C, h, w]
    std: Tensor  # [C, h, w]
    mask: Tensor  # [1, h, w]
    valid: Tensor  # [1, h, w]


class Data:
    """Draws batches. Latents are cached when nothing random is upstream, or as `train.variants` versions of each picture.

    Pictures of role "instance" fill `batch_size` rows; where a penalty asks for class pictures, as many rows follow.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        recipe: Recipe,
        backbone: Backbone,
        words: Mapping[str, str],
        class_nouns: Mapping[str, str],
    ) -> None:
        self.recipe, self.backbone, self.words, self.class_nouns = recipe, backbone, words, class_nouns
        self.random = any(a.random for a in recipe.augment.values())
        ready = [self._prepared(e, i) for i, e in enumerate(examples)]
        self.instances = [e for e in ready if e.role == "instance"]
        self.priors = [e for e in ready if e.role == "prior"]
        if not self.instances:
            raise ValueError("there are no pictures of the subject: the recipe has no source of role instance")
        self.with_priors = any(r.needs_class_examples for r in recipe.regularize.values())
        if self.with_priors and not self.priors:
            raise ValueError("the recipe asks for class pictures, but its sources gave none")
        self.has_masks = any(e.mask is not None for e in self.instances)
        if recipe.objective.masked and not self.has_masks:
            import warnings

            warnings.warn("objective.masked is on, but no picture has a mask: the whole picture counts", stacklevel=2)
        self._rows: dict[tuple[str, int, int], Row] = {}

    def _prepared(self, example: Example, index: int) -> Example:
        """What is the same each time: masks, augmentations where none is random, other concepts named in a caption."""
        for mask in self.recipe.masks.values():
            example = mask(example)
        for augment in () if self.random else self.recipe.augment.values():
            example = augment(example, generator(self.recipe.seed, _FIXED, index))
        others = {n: placeholder for n, placeholder in self.backbone.placeholders.items() if n != example.owner}
        try:
            own = example.caption.replace(f"<{example.owner}>", "{concept}")
            said = expand(own if example.role == "instance" else example.caption, others)
        except ValueError as error:
            raise ValueError(f"the caption of {example.source}: {error}") from None
        return example.with_(caption=said)

    @property
    def cached(self) -> bool:
        """Whether latents are made once."""
        return self.recipe.train.cache and (not self.random or self.recipe.train.variants > 0)

    def batch(self, step: int, micro: int) -> Batch:
        """The rows of one micro-batch; the same for the same (seed, step, micro)."""
        draw = generator(self.recipe.seed, step, micro)
        rows = self._draw("instance", step, micro, draw)
        if self.with_priors:
            rows += self._draw("prior", step, micro, draw)
        device = self.backbone.device
        mean, std = (torch.stack([getattr(r, k) for r in rows]) for k in ("mean", "std"))
        latents = mean + std * torch.randn(mean.shape, generator=draw)
        return Batch(
            captions=tuple(r.example.caption for r in rows),
            owner=tuple(r.example.owner for r in rows),
            role=tuple(r.example.role for r in rows),
            latents=latents.to(device),
            mask=torch.stack([r.mask for r in rows]).to(device) if self.has_masks else None,
            valid=torch.stack([r.valid for r in rows]).to(device)
            if any(bool((r.valid < 1).any()) for r in rows)
            else None,
        )

    def _draw(self, role: str, step: int, micro: int, draw: torch.Generator) -> list[Row]:
        train = self.recipe.train
        pool = self.instances if role == "instance" else self.priors
        first = (step * train.gradient_accumulation + micro) * train.batch_size
        rows = []
        for position in range(first, first + train.batch_size):
            epoch, place = divmod(position, len(pool))
            order = torch.randperm(
                len(pool), generator=generator(self.recipe.seed, _ORDER + epoch, int(role == "prior"))
            )
            rows.append(self._row(role, int(order[place]), draw))
        return rows

    def _row(self, role: str, index: int, draw: torch.Generator) -> Row:
        variants = max(1, self.recipe.train.variants) if self.random else 1
        variant = int(torch.randint(variants, (), generator=draw))
        key = (role, index, variant)
        pool = self.instances if role == "instance" else self.priors
        if not self.cached:
            return self._encode([self._augmented(pool[index], draw)])[0]
        if key not in self._rows:
            self._fill(role, variant)
        row = self._rows[key]
        if self.random:
            return row  # an augmentation may have put words into its caption
        # the caption is drawn anew each time: it costs nothing and is half of the variety there is
        return Row(self._caption(pool[index], draw), row.mean, row.std, row.mask, row.valid)

    def _caption(self, example: Example, draw: torch.Generator) -> Example:
        return self.recipe.prompts(
            example, draw, self.words.get(example.owner, ""), self.class_nouns.get(example.owner, "")
        )

    def _augmented(self, example: Example, draw: torch.Generator) -> Example:
        example = self._caption(example, draw)
        for augment in self.recipe.augment.values() if self.random else ():
            example = augment(example, draw)
        return example

    def fill(self) -> None:
        """Cache all there is to cache now: afterwards the autoencoder is not needed any more."""
        for role, pool in (("instance", self.instances), ("prior", self.priors if self.with_priors else [])):
            for variant in range(max(1, self.recipe.train.variants) if self.random else 1) if pool else ():
                if (role, 0, variant) not in self._rows:
                    self._fill(role, variant)

    def _fill(self, role: str, variant: int) -> None:
        """Cache every row of one role and variant, a bounded number of pixels at a time."""
        pool = self.instances if role == "instance" else self.priors
        at_once = images_per_batch(max(e.pixels[0].numel() for e in pool), _ENCODE_PIXELS)
        for start in range(0, len(pool), at_once):
            part = list(range(start, min(start + at_once, len(pool))))
            ready = []
            for index in part:
                draw = generator(self.recipe.seed, _VARIANT + variant, index * 2 + int(role == "prior"))
                ready.append(self._augmented(pool[index], draw))
            for index, row in zip(part, self._encode(ready), strict=True):
                self._rows[(role, index, variant)] = row

    @torch.no_grad()
    def _encode(self, examples: Sequence[Example]) -> list[Row]:
        pixels = torch.stack([e.pixels for e in examples]).to(self.backbone.device, self.backbone.dtype)
        with torch.autocast(pixels.device.type, enabled=False):  # the autoencoder keeps the precision it was loaded in
            means, stds = (m.float().cpu() for m in self.backbone.latent_moments(pixels))
        size = means.shape[-2:]
        return [
            Row(e.with_(pixels=e.pixels[:, :0, :0]), mean, std, _at(e.mask, size), _at(e.valid, size))
            for e, mean, std in zip(examples, means, stds, strict=True)
        ]


def _at(mask: Tensor | None, size: torch.Size) -> Tensor:
    """A mask at latent size, by area; ones where there is none."""
    if mask is None:
        return torch.ones(1, *size)
    return F.interpolate(mask[None].float(), size=tuple(size), mode="area")[0]
