"""Turns examples into batches: chooses their order, captions and augmentations, and caches what does not vary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from shared.backbones.protocol import Backbone
from shared.masks import pool_masks
from shared.prompts import expand
from shared.recipe.schema import Recipe
from shared.sampling.sampler import images_per_batch
from shared.train.loop import generator
from shared.types import Batch, Example, Role

_ENCODE_PIXELS = 2**18  # maximum number of pixels per autoencoder pass while caching (one 512x512 picture)
#: Step numbers that never occur in a run. They seed separate random streams for the order of examples in an epoch, for
#: cached variants, and for the preparation of examples.
_ORDER, _VARIANT, _FIXED = 2**40, 2**41, 2**43


@dataclass(frozen=True)
class CachedExample:
    """One example ready to be batched: the mean and standard deviation of its latents, and its masks at latent size."""

    example: Example  # without pixels, unless a part needs them
    mean: Tensor  # [C, (f), h, w]
    std: Tensor  # [C, (f), h, w]
    mask: Tensor  # [1, (f), h, w], the union of all masks; all ones if there are no masks
    masks: Mapping[str, Tensor]  # owner -> [1, (f), h, w]
    valid: Tensor  # [1, (f), h, w]


class Data:
    """Draws batches.

    With `train.cache`, the latents of each picture are cached. If no augmentation is random, there is one version of
    each picture; otherwise, there are `train.variants` versions. If that number is 0, nothing is cached. Unless
    `keep_pixels` is set, pixels are dropped as soon as their latents are cached.

    The first `batch_size` rows of a batch have the role "instance"; if a penalty needs class pictures, as many
    class examples follow.

    Args:
        examples: consumed once, in order
        words: owner -> the words that stand for it in a caption
        keep_pixels: whether batches also contain pixels, which some parts need
    """

    def __init__(
        self,
        examples: Iterable[Example],
        recipe: Recipe,
        backbone: Backbone,
        words: Mapping[str, str],
        class_nouns: Mapping[str, str],
        keep_pixels: bool = False,
    ) -> None:
        self.recipe, self.backbone, self.words, self.class_nouns = recipe, backbone, words, class_nouns
        self.keep_pixels = keep_pixels
        self.random = any(a.random for a in recipe.augment.values())
        self.with_priors = any(r.needs_class_examples for r in recipe.regularize.values())
        self._cache: dict[tuple[str, int, int], CachedExample] = {}
        self._by_role: dict[str, list[Example]] = {"instance": [], "prior": []}
        self._read(examples)
        if not self.instances:
            raise ValueError("there are no pictures of the subject: the recipe has no source with role instance")
        if self.with_priors and not self.priors:
            raise ValueError("the recipe needs class pictures, but its sources provide none")
        self.has_masks = any(e.masks for e in self.instances)
        if (recipe.objective.masked or recipe.objective.inverts) and not self.has_masks:
            import warnings

            asked = (
                "objective.inside is below objective.outside" if recipe.objective.inverts else "objective.masked is on"
            )
            warnings.warn(f"{asked}, but no picture has a mask, so the loss covers whole pictures", stacklevel=2)

    @property
    def instances(self) -> list[Example]:
        return self._by_role["instance"]

    @property
    def priors(self) -> list[Example]:
        return self._by_role["prior"]

    @property
    def cached(self) -> bool:
        """Whether latents are computed once and cached."""
        return self.recipe.train.cache and (not self.random or self.recipe.train.variants > 0)

    @property
    def _variants(self) -> int:
        return max(1, self.recipe.train.variants) if self.random else 1

    # --- reading -------------------------------------------------------------------------------------------

    def _read(self, examples: Iterable[Example]) -> None:
        """Reads the examples. If latents are cached, encodes the examples in batches of limited size."""
        waiting: dict[str, list[int]] = {"instance": [], "prior": []}
        for number, example in enumerate(examples):
            if example.role == "prior" and not self.with_priors:
                continue
            of_role, indices = self._by_role[example.role], waiting[example.role]
            of_role.append(self._prepared(example, number))
            indices.append(len(of_role) - 1)
            if self.cached and len(indices) == images_per_batch(example.pixels[0].numel(), _ENCODE_PIXELS):
                self._fill(example.role, indices)
                indices.clear()
        for role, indices in waiting.items():
            if self.cached and indices:
                self._fill(role, indices)

    def _prepared(self, example: Example, index: int) -> Example:
        """Does the work that never varies.

        Adds masks, applies the augmentations if none is random, and expands the names of other concepts in the caption.
        """
        for mask in self.recipe.masks.values():
            example = mask(example)
        for augment in () if self.random else self.recipe.augment.values():
            example = augment(example, generator(self.recipe.seed, _FIXED, index))
        loaded = {n: p for n, p in self.backbone.placeholders.items() if n not in example.owners}
        try:
            caption = example.caption if example.role == "prior" else _own_name_open(example)
            return example.with_(caption=expand(caption, loaded))
        except ValueError as error:
            raise ValueError(f"the caption of {example.source}: {error}") from None

    def _fill(self, role: str, indices: Sequence[int]) -> None:
        """Caches every variant of these examples, and then drops their pixels."""
        of_role = self._by_role[role]
        for variant in range(self._variants):
            ready = []
            for index in indices:
                draw = generator(self.recipe.seed, _VARIANT + variant, index * 2 + int(role == "prior"))
                ready.append(self._augmented(of_role[index], draw) if self.random else of_role[index])
            for index, cached in zip(indices, self._encode(ready), strict=True):
                self._cache[(role, index, variant)] = cached
        for index in indices:
            of_role[index] = _without_pixels(of_role[index])

    @torch.no_grad()
    def _encode(self, examples: Sequence[Example]) -> list[CachedExample]:
        if len({e.pixels.shape for e in examples}) > 1:  # pictures and clips, or clips of different lengths
            return [cached for e in examples for cached in self._encode([e])]
        pixels = torch.stack([e.pixels for e in examples]).to(self.backbone.device, self.backbone.dtype)
        with torch.autocast(pixels.device.type, enabled=False):  # the autoencoder keeps the precision it was loaded in
            means, stds = (m.float().cpu() for m in self.backbone.latent_moments(pixels))
        size = means.shape[2:]
        return [
            CachedExample(
                e if self.keep_pixels else _without_pixels(e),
                mean,
                std,
                _at(e.mask, size),
                {owner: _at(mask, size) for owner, mask in e.masks.items()},
                _at(e.valid, size),
            )
            for e, mean, std in zip(examples, means, stds, strict=True)
        ]

    # --- drawing -------------------------------------------------------------------------------------------

    def batch(self, step: int, micro: int, role: Role | None = None) -> Batch:
        """Returns one micro-batch, which is always the same for the same (seed, step, micro).

        Args:
            role: the role of the examples. If None, the batch contains subject examples and, if a penalty needs them,
                class examples
        """
        draw = generator(self.recipe.seed, step, micro)
        roles: tuple[Role, ...] = ("instance", "prior") if self.with_priors else ("instance",)
        drawn = [one for r in roles if role in (None, r) for one in self._draw(r, step, micro, draw)]
        device = self.backbone.device
        if len({r.mean.shape for r in drawn}) > 1:
            raise ValueError(
                f"train.batch_size = {self.recipe.train.batch_size}: a batch cannot mix pictures and clips, or clips of "
                "different lengths; set it to 1"
            )
        mean, std = (torch.stack([getattr(r, k) for r in drawn]) for k in ("mean", "std"))
        latents = mean + std * torch.randn(mean.shape, generator=draw)
        owners = dict.fromkeys(owner for r in drawn for owner in r.masks)
        partly = any(bool((r.valid < 1).any()) for r in drawn)
        return Batch(
            captions=tuple(r.example.caption for r in drawn),
            owners=tuple(r.example.owners for r in drawn),
            role=tuple(r.example.role for r in drawn),
            latents=latents.to(device),
            owner_masks={n: torch.stack([_mask_of(r, n) for r in drawn]).to(device) for n in owners},
            mask=torch.stack([r.mask for r in drawn]).to(device) if self.has_masks else None,
            valid=torch.stack([r.valid for r in drawn]).to(device) if partly else None,
            pixels=torch.stack([r.example.pixels for r in drawn]).to(device) if self.keep_pixels else None,
            sources=tuple(r.example.source for r in drawn),
        )

    def _draw(self, role: str, step: int, micro: int, draw: torch.Generator) -> list[CachedExample]:
        train, of_role = self.recipe.train, self._by_role[role]
        first = (step * train.gradient_accumulation + micro) * train.batch_size
        drawn = []
        for position in range(first, first + train.batch_size):
            epoch, place = divmod(position, len(of_role))
            order = torch.randperm(
                len(of_role), generator=generator(self.recipe.seed, _ORDER + epoch, int(role == "prior"))
            )
            drawn.append(self._cached_example(role, int(order[place]), draw))
        return drawn

    def _cached_example(self, role: str, index: int, draw: torch.Generator) -> CachedExample:
        variant = int(torch.randint(self._variants, (), generator=draw))
        example = self._by_role[role][index]
        if not self.cached:
            return self._encode([self._augmented(example, draw)])[0]
        cached = self._cache[(role, index, variant)]
        if self.random:
            return cached  # with its own caption, which an augmentation may have changed
        # drawing a new caption each time costs nothing and adds variety
        captioned = self._caption(example, draw)
        updated = captioned.with_(pixels=cached.example.pixels) if self.keep_pixels else captioned
        if captioned.owners == example.owners:
            return replace(cached, example=updated)
        masks = {name: mask for name, mask in cached.masks.items() if name in captioned.owners}
        union = torch.stack(list(masks.values())).amax(0) if masks else torch.ones_like(cached.mask)
        return replace(cached, example=updated, masks=masks, mask=union)

    def _caption(self, example: Example, draw: torch.Generator) -> Example:
        return self.recipe.prompts(example, draw, self.words, self.class_nouns)

    def _augmented(self, example: Example, draw: torch.Generator) -> Example:
        example = self._caption(example, draw)
        for augment in self.recipe.augment.values() if self.random else ():
            example = augment(example, draw)
        return example


def _own_name_open(example: Example) -> str:
    """Returns the example's caption with the owner's name replaced by {concept}, which is filled in later."""
    return example.caption.replace(f"<{example.owner}>", "{concept}")


def _without_pixels(example: Example) -> Example:
    """Returns the example without its pixels. The masks are kept, because later checks look for them."""
    return example.with_(pixels=example.pixels[..., :0, :0].clone())


def _mask_of(cached: CachedExample, owner: str) -> Tensor:
    """Returns the owner's mask in this example, [1, (f), h, w].

    Without a mask for the owner, the result is all ones if the example shows the owner, and all zeros otherwise.
    """
    if owner in cached.masks:
        return cached.masks[owner]
    return torch.ones_like(cached.mask) if owner in cached.example.owners else torch.zeros_like(cached.mask)


def _at(mask: Tensor | None, size: torch.Size) -> Tensor:
    """Resizes a mask to latent size by averaging over areas. Returns all ones if there is no mask.

    The frames of a clip are pooled over time in the same way as in the autoencoder.
    """
    if mask is None:
        return torch.ones(1, *size)
    if mask.ndim == 4:
        return pool_masks(mask[None], (size[0], size[1], size[2]))[0]
    return F.interpolate(mask[None].float(), size=tuple(size), mode="area")[0]
