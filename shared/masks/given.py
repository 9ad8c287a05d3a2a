"""Uses the masks that came with the pictures."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.masks.base import MaskPart, no_mask
from shared.types import Example


class Given(MaskPart):
    """Keeps masks as they are, or binarizes them at `threshold`.

    If `require` is set, every reference must have a mask.
    """

    taxonomy: ClassVar[str] = "given masks"
    kind: Literal["given"] = "given"
    require: bool = False
    threshold: Annotated[float, Field(gt=0, lt=1)] | None = None  # values above it become 1, all others 0

    @property
    def needs_masks(self) -> bool:
        return self.require

    def __call__(self, example: Example, generator: torch.Generator | None = None) -> Example:
        if self.needs_masks and not example.masks and example.role == "instance":
            raise ValueError(no_mask(example.source))
        return super().__call__(example, generator)

    def change(self, mask: Tensor) -> Tensor:
        return mask if self.threshold is None else (mask > self.threshold).float()
