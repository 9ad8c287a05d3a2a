"""A field with three planes of features and a small MLP that decodes them (EG3D, https://arxiv.org/abs/2112.07945)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn
from torch.nn import functional as F

from pcs_3d.fields.base import FieldPart
from pcs_3d.fields.networks import NetworkField
from shared.trainable.base import Rate


class Triplane(FieldPart):
    """Three planes (xy, xz and yz), each with `resolution`² vectors of `features` numbers. At each point, the vectors
    interpolated from the three planes are summed. An MLP with one hidden layer of `width` units decodes the sum."""

    kind: Literal["triplane"] = "triplane"
    resolution: Annotated[int, Setting(ge=4, le=2048)] = 64
    features: Annotated[int, Setting(ge=1, le=256)] = 16
    width: Annotated[int, Setting(ge=4, le=1024)] = 32
    lr: Rate = 3e-3
    lr_features: Rate | None = 3e-2

    def build(self, channels: int = 3, seed: int = 0) -> TriplaneField:
        return TriplaneField(self, channels, seed)


class TriplaneField(NetworkField):
    """The planes, `[3, features, R, R]`, and the network that decodes their features."""

    def __init__(self, part: Triplane, channels: int, seed: int) -> None:
        super().__init__(part, channels, [part.features, part.width], seed)
        shape = (3, part.features, part.resolution, part.resolution)
        self.planes = nn.Parameter(0.1 * torch.randn(shape, generator=self.generator))

    def encoded(self, points: Tensor) -> Tensor:
        x, y, z = (points / self.bound).unbind(-1)
        places = torch.stack([torch.stack(pair, -1) for pair in ((x, y), (x, z), (y, z))])[:, None]
        return F.grid_sample(self.planes, places, align_corners=True, padding_mode="border")[:, :, 0].sum(0).T

    def total_variation(self) -> Tensor:
        """Returns the total variation of the planes' features."""
        p = self.planes
        return (p[:, :, 1:] - p[:, :, :-1]).square().mean() + (p[..., 1:] - p[..., :-1]).square().mean()
