"""A field that stores features in hash tables at several resolutions and decodes them with a small MLP (Instant NGP,
https://arxiv.org/abs/2201.05989). It is written in pure PyTorch and therefore runs on any device."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from pcs_3d.fields.base import FieldPart
from pcs_3d.fields.field import Replaced
from pcs_3d.fields.grids import weighted_rows
from pcs_3d.fields.networks import NetworkField
from shared.trainable.base import Rate

_PRIMES = (1, 2654435761, 805459861)  # from section 3 of the paper


class HashGrid(FieldPart):
    """Grids at `levels` resolutions, from `coarsest` to `finest` nodes along each side. Each grid has a table of
    2^`table` rows with `features` numbers each. A network with one hidden layer of `width` units decodes the features.

    unlock: the share of the run over which finer levels are added one by one. If 0, all levels are used from the start.
    """

    kind: Literal["hash_grid"] = "hash_grid"
    levels: Annotated[int, Setting(ge=1, le=24)] = 8
    features: Annotated[int, Setting(ge=1, le=8)] = 2
    table: Annotated[int, Setting(ge=4, le=22)] = 15
    coarsest: Annotated[int, Setting(ge=2, le=256)] = 8
    finest: Annotated[int, Setting(ge=2, le=4096)] = 128
    width: Annotated[int, Setting(ge=4, le=1024)] = 32
    unlock: Annotated[float, Setting(ge=0, le=1)] = 0.0
    lr: Rate = 3e-3
    lr_features: Rate | None = 1e-2

    def build(self, channels: int = 3, seed: int = 0) -> HashField:
        return HashField(self, channels, seed)


class HashField(NetworkField):
    """The hash tables, `[levels, 2^table, features]`, and the network that decodes their features."""

    part: HashGrid
    open_levels: Tensor

    def __init__(self, part: HashGrid, channels: int, seed: int) -> None:
        super().__init__(part, channels, [3 + part.levels * part.features, part.width], seed)
        shape = (part.levels, 2**part.table, part.features)
        self.tables = nn.Parameter(torch.empty(shape).uniform_(-1e-2, 1e-2, generator=self.generator))
        self.register_buffer("open_levels", torch.ones(part.levels))
        growth = (part.finest / part.coarsest) ** (1 / max(1, part.levels - 1))
        self.sides = [round(part.coarsest * growth**i) for i in range(part.levels)]

    def advance(self, step: int, steps: int) -> Replaced | None:
        if self.part.unlock > 0:
            reached = 1 + (self.part.levels - 1) * step / max(1.0, self.part.unlock * steps)
            levels = torch.arange(self.part.levels, device=self.open_levels.device)
            self.open_levels.copy_((reached - levels).clamp(0, 1))
        return None

    def encoded(self, points: Tensor) -> Tensor:
        place = (points / self.bound + 1) / 2
        levels = [self._level(i, side, place) * self.open_levels[i] for i, side in enumerate(self.sides)]
        return torch.cat([2 * place - 1, *levels], -1)

    def _level(self, level: int, side: int, place: Tensor) -> Tensor:
        scaled = place.clamp(0, 1) * (side - 1)
        corner = scaled.detach().floor().clamp(max=side - 2)
        along = scaled - corner
        bits = torch.arange(2, device=place.device)
        x, y, z = (corner.long()[:, None] + bits[:, None]).unbind(-1)  # each [N, 2]
        sides = torch.stack([1 - along, along], 1)
        weights = sides[:, :, None, None, 0] * sides[:, None, :, None, 1] * sides[:, None, None, :, 2]
        size = self.tables.shape[1]
        if side**3 <= size:  # each node has its own row
            rows = (x[:, :, None, None] * side + y[:, None, :, None]) * side + z[:, None, None]
        else:
            a, b, c = (v * prime for v, prime in zip((x, y, z), _PRIMES, strict=True))
            rows = (a[:, :, None, None] ^ b[:, None, :, None] ^ c[:, None, None]) % size
        return weighted_rows(self.tables[level], rows.reshape(-1, 8), weights.reshape(-1, 8))
