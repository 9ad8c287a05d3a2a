"""Mirrors pictures left to right."""

from __future__ import annotations

import re
from typing import Literal

import torch
from pydantic import Field

from shared.augment.base import Augmentation, uniform
from shared.types import Example

_SIDES = re.compile(r"\b(left|right|leftmost|rightmost)\b", re.IGNORECASE)


class Flip(Augmentation):
    """Mirrors pictures with probability `p`, except those whose captions mention left or right, which would
    become wrong.

    Do not flip subjects with text or asymmetric parts.
    """

    kind: Literal["flip"] = "flip"
    p: float = Field(default=0.5, ge=0, le=1)

    @property
    def random(self) -> bool:
        return 0 < self.p < 1

    def apply(self, example: Example, generator: torch.Generator) -> Example:
        if uniform(0, 1, generator) >= self.p or _SIDES.search(example.caption):
            return example
        return example.with_(
            pixels=example.pixels.flip(-1),
            masks={owner: mask.flip(-1) for owner, mask in example.masks.items()},
            valid=None if example.valid is None else example.valid.flip(-1),
        )
