"""What is behind a thing in a step."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from shared.config import Part


class Backgrounds(Part):
    """What is behind a thing in a step: one colour for each view.

    With the probability `random` it is any colour; else one of `colors`. What always stood on the same colour would be
    learned as a wall of that colour around the thing.
    """

    colors: Annotated[tuple[tuple[float, float, float], ...], Field(min_length=1)] = ((1.0, 1.0, 1.0),)
    random: Annotated[float, Field(ge=0, le=1)] = 0.5
    same: bool = False  # for all views of a step

    def draw(self, count: int, channels: int, generator: Generator) -> Tensor:
        """[B, K, 1, 1] in [0, 1]; fields in latent space (K other than 3) are shown on 0."""
        rows = 1 if self.same else count
        chosen = torch.randint(len(self.colors), (rows,), generator=generator)
        any_color = torch.rand(rows, 3, generator=generator)
        coin = torch.rand(rows, 1, generator=generator)
        colors = torch.where(coin < self.random, any_color, torch.tensor(self.colors)[chosen])
        if channels != 3:
            return torch.zeros(count, channels, 1, 1)
        return colors.expand(count, 3)[:, :, None, None].contiguous()
