"""The base class for fields with a network. The network's output is added to a coarse grid that contains the start."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcs_3d.fields import grids
from pcs_3d.fields.base import BaseVolume, FieldPart
from pcs_3d.fields.field import Sample
from pcs_3d.fields.starts import first_grid

_START = 32  # number of nodes along each side of the grid that contains the start


class NetworkField(BaseVolume):
    """A field with density = softplus(start + MLP(encoding)). The start is added in the same way that DreamFusion adds
    its blob. The last layer is initialised to 0, so that the field initially equals its start."""

    start: Tensor

    def __init__(self, part: FieldPart, channels: int, widths: list[int], seed: int) -> None:
        super().__init__(part.bound, channels)
        self.part = part
        self.register_buffer("start", first_grid(part.start, _START, part.bound, channels))
        self.generator = torch.Generator().manual_seed(seed)
        self.mlp = mlp([*widths, 1 + channels], self.generator)

    def encoded(self, points: Tensor) -> Tensor:
        """Encodes points (`[N, 3]`) as inputs for the network (`[N, widths[0]]`)."""
        raise NotImplementedError

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        own = {id(p) for p in self.mlp.parameters()}
        tables = [p for p in self.parameters() if id(p) not in own]
        return [("tables", tables, self.part.feature_rate)] * bool(tables) + [
            ("mlp", list(self.mlp.parameters()), self.part.lr)
        ]

    def at(self, points: Tensor) -> Sample:
        flat = points.reshape(-1, 3)
        raw = self.mlp(self.encoded(flat)) + grids.trilinear(self.start, flat, self.bound)
        raw = raw.reshape(*points.shape[:-1], -1)
        return Sample(F.softplus(raw[..., 0]) * self.inside(points), self.colored(raw[..., 1:]))


def mlp(widths: list[int], generator: torch.Generator) -> nn.Sequential:
    """Returns linear layers with SiLU between them. The last layer is initialised to 0."""
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        layer = nn.Linear(before, after)
        with torch.no_grad():
            layer.bias.zero_()
            layer.weight.copy_(torch.randn(after, before, generator=generator) * (2 / before) ** 0.5)
            if i == len(widths) - 2:
                layer.weight.zero_()
        layers += [layer, nn.SiLU()]
    return nn.Sequential(*layers[:-1])
