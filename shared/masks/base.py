"""What every mask part has in common."""

from __future__ import annotations

import torch
from torch import Tensor

from shared.config import KindPart
from shared.types import Example


class MaskPart(KindPart):
    """Changes the mask of an example, always in the same way. Examples without a mask pass."""

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
