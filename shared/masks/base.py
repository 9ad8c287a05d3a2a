"""The base class of all mask parts."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.config import KindPart
from shared.types import Example


def no_mask(picture: object) -> str:
    """Returns the error message for a picture that must have a mask."""
    return (
        f"{picture} has no mask, but this recipe requires one. Put a mask with the picture's name in masks/ next to "
        "the pictures, or use pictures with a transparent background."
    )


class MaskPart(KindPart):
    """Changes an example's mask deterministically. Examples without a mask are passed through."""

    @property
    def needs_masks(self) -> bool:
        """Whether every picture of a subject must have a mask."""
        return False

    @property
    def random(self) -> bool:
        """Always False, because masks are prepared only once."""
        return False

    def __call__(self, example: Example, generator: torch.Generator | None = None) -> Example:
        """Returns the example with its masks changed. The generator is unused."""
        return example.with_masks(self.change)

    def change(self, mask: Tensor) -> Tensor:
        """Returns the changed mask, [1, H, W] in [0, 1] like `mask`."""
        raise NotImplementedError
