"""The base class of all augmentations."""

from __future__ import annotations

import torch

from shared.config import KindPart
from shared.types import Example, Role


class Augmentation(KindPart):
    """Changes the picture, masks and valid area of an example alike, each time the example is drawn.

    Augmentations run after the prompt part has filled in the caption, and after the mask parts have made masks.
    """

    roles: tuple[Role, ...] = ("instance", "prior")  # the roles of the examples that are changed

    @property
    def random(self) -> bool:
        """Whether two calls may give different results. Latents are cached if no augmentation is random."""
        return True

    def __call__(self, example: Example, generator: torch.Generator) -> Example:
        """Returns the changed example, or the example itself if it has another role. All frames of a clip change in the
        same way."""
        if example.role not in self.roles:
            return example
        if not example.is_clip:
            return self.apply(example, generator)
        start, frames = generator.get_state(), []
        for frame in example.frames():
            generator.set_state(start)  # one draw for the whole clip
            frames.append(self.apply(frame, generator))
        return Example.clip(frames)

    def apply(self, example: Example, generator: torch.Generator) -> Example:
        """Returns the changed example, which is a picture or one frame of a clip."""
        raise NotImplementedError


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    """Draws a number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def integer(limit: int, generator: torch.Generator) -> int:
    """Draws an integer from 0 to limit - 1."""
    return int(torch.randint(limit, (), generator=generator))
