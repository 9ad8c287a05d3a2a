"""What every mask part has in common."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.config import KindPart
from shared.types import Example


def no_mask(picture: object) -> str:
    """What is said of a picture that must have a mask."""
    return (
        f"{picture} has no mask, and this recipe requires one: put it in masks/ beside the pictures, with the same name, "
        "or give pictures with a transparent background"
    )


class MaskPart(KindPart):
    """Changes the mask of an example, always in the same way. Examples without a mask pass."""

    @property
    def needs_masks(self) -> bool:
        """Whether each picture of a subject must have come with a mask."""
        return False

    @property
    def random(self) -> bool:
        """Never: masks are prepared once."""
        return False

    def __call__(self, example: Example, generator: torch.Generator | None = None) -> Example:
        """The example with the changed mask; the generator is not used."""
        return example.with_masks(self.change)

    def change(self, mask: Tensor) -> Tensor:
        """[1, H, W] in [0, 1] -> the same."""
        raise NotImplementedError
