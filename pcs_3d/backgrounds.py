"""The backgrounds of the views in a step."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from shared.config import Part, Real


class Backgrounds(Part):
    """The background colour of each view in a step.

    With probability `random`, it is a random colour; otherwise, it is one of `colors`. If the background were always
    the same colour, the field would grow a wall of that colour around the object.
    """

    colors: Annotated[tuple[tuple[Real, Real, Real], ...], Field(min_length=1)] = ((1.0, 1.0, 1.0),)
    random: Annotated[float, Field(ge=0, le=1)] = 0.5
    same: bool = False  # use one colour for all views of a step

    def draw(self, count: int, channels: int, generator: Generator) -> Tensor:
        """Draws the backgrounds of `count` views (`[B, K, 1, 1]`, in [0, 1]). In latent space (K other than 3), they
        are 0."""
        rows = 1 if self.same else count
        chosen = torch.randint(len(self.colors), (rows,), generator=generator)
        any_color = torch.rand(rows, 3, generator=generator)
        coin = torch.rand(rows, 1, generator=generator)
        colors = torch.where(coin < self.random, any_color, torch.tensor(self.colors)[chosen])
        if channels != 3:
            return torch.zeros(count, channels, 1, 1)
        return colors.expand(count, 3)[:, :, None, None].contiguous()
