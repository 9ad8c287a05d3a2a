"""What every augmentation has in common."""

from __future__ import annotations

import torch

from shared.config import KindPart
from shared.types import Example, Role


class Augmentation(KindPart):
    """Changes an example as it is drawn: picture, mask and valid area together, with the generator it is given.

    Runs after the prompt part (captions are filled) and after the masks.
    """

    roles: tuple[Role, ...] = ("instance", "prior")  # which examples are changed

    @property
    def random(self) -> bool:
        """Whether two calls may differ; where nothing is random, latents are cached."""
        return True

    def __call__(self, example: Example, generator: torch.Generator) -> Example:
        """The changed example; examples of other roles pass as they are."""
        return self.apply(example, generator) if example.role in self.roles else example

    def apply(self, example: Example, generator: torch.Generator) -> Example:
        raise NotImplementedError


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """One number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def integer(limit: int, generator: torch.Generator) -> int:
    """One of 0 … limit - 1."""
    return int(torch.randint(limit, (), generator=generator))
