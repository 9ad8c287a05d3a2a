"""A field that passes sines and cosines of the coordinates to an MLP (NeRF, https://arxiv.org/abs/2003.08934)."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor

from pcs_3d.fields.base import FieldPart
from pcs_3d.fields.networks import NetworkField
from shared.trainable.base import Rate


class FrequencyMlp(FieldPart):
    """A field that passes sines and cosines of the coordinates to an MLP (NeRF).

    bands: the number of octaves of sines and cosines.
    width, layers: the width and number of the hidden layers.
    """

    kind: Literal["frequency_mlp"] = "frequency_mlp"
    bands: Annotated[int, Setting(ge=1, le=12)] = 6
    width: Annotated[int, Setting(ge=4, le=1024)] = 64
    layers: Annotated[int, Setting(ge=1, le=8)] = 3
    lr: Rate = 1e-3

    def build(self, channels: int = 3, seed: int = 0) -> FrequencyField:
        return FrequencyField(self, channels, [3 + 6 * self.bands] + [self.width] * self.layers, seed)


class FrequencyField(NetworkField):
    """A smooth field that needs little memory but is slow."""

    part: FrequencyMlp

    def encoded(self, points: Tensor) -> Tensor:
        scaled = points / self.bound
        octaves = math.pi * 2.0 ** torch.arange(self.part.bands, device=points.device, dtype=points.dtype)
        angles = (scaled[..., None] * octaves).flatten(-2)
        return torch.cat([scaled, angles.sin(), angles.cos()], -1)
