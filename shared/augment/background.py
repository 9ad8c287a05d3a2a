"""Replaces the background behind the subject, so that the background is not learned."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.augment.base import Augmentation, integer, uniform
from shared.types import Example, Role

Fill = Literal["color", "noise", "grey"]


class Background(Augmentation):
    """With probability `p`, replaces everything outside the mask with one of `fills` (DreamTuner's random masking).

    "color" is one random colour, "noise" is uniform noise per pixel, and "grey" is mid-grey. Every example with one of
    the given `roles` needs a mask. If one has none, raises ValueError, naming the picture. Captions that describe
    the background become wrong.
    """

    kind: Literal["background"] = "background"
    roles: tuple[Role, ...] = ("instance",)
    p: float = Field(default=0.5, ge=0, le=1)
    fills: tuple[Fill, ...] = Field(default=("color", "noise"), min_length=1)

    @property
    def random(self) -> bool:
        return self.p > 0

    def apply(self, example: Example, generator: torch.Generator) -> Example:
        if example.mask is None:
            raise ValueError(
                f"augment background needs a mask for {example.source}; put one in masks/ next to the picture"
            )
        if uniform(0, 1, generator) >= self.p:
            return example
        ground = self._ground(example.pixels, self.fills[integer(len(self.fills), generator)], generator)
        return example.with_(pixels=torch.lerp(ground, example.pixels, example.mask))

    def _ground(self, like: Tensor, fill: Fill, generator: torch.Generator) -> Tensor:
        if fill == "grey":
            return torch.zeros_like(like)
        shape = (3, 1, 1) if fill == "color" else tuple(like.shape)
        return (torch.rand(shape, generator=generator) * 2 - 1).expand_as(like)
