"""Makes small random changes to brightness, contrast and saturation."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from shared.augment.base import Augmentation, uniform
from shared.types import Example

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class ColorJitter(Augmentation):
    """Multiplies the brightness, contrast and saturation of a picture by random factors from [1 - a, 1 + a], where a is
    the corresponding setting. Padding stays grey.

    Keep these settings small, because colour is part of most subjects' identity.
    """

    kind: Literal["color_jitter"] = "color_jitter"
    brightness: float = Field(default=0.1, ge=0, lt=1)
    contrast: float = Field(default=0.1, ge=0, lt=1)
    saturation: float = Field(default=0.1, ge=0, lt=1)

    @property
    def random(self) -> bool:
        return max(self.brightness, self.contrast, self.saturation) > 0

    def apply(self, example: Example, generator: torch.Generator) -> Example:
        light, contrast, colour = (
            uniform(1 - a, 1 + a, generator) for a in (self.brightness, self.contrast, self.saturation)
        )
        valid = torch.ones_like(example.pixels[:1]) if example.valid is None else example.valid
        rgb = (example.pixels + 1) / 2 * light
        luma = torch.tensor(_LUMA)[:, None, None]
        mean = (rgb * luma * valid).sum() / valid.sum().clamp_min(1)
        rgb = mean + (rgb - mean) * contrast
        grey = (rgb * luma).sum(0, keepdim=True)
        rgb = (grey + (rgb - grey) * colour).clamp(0, 1)
        return example.with_(pixels=torch.where(valid > 0, rgb * 2 - 1, example.pixels))
