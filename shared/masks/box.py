"""Replaces masks with rectangles around them."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.masks.base import MaskPart


class Box(MaskPart):
    """Replaces the mask with the bounding box of its values above 0.5, enlarged by `margin` pixels on each side."""

    taxonomy: ClassVar[str] = "boxes as masks"
    kind: Literal["box"] = "box"
    margin: int = Field(default=0, ge=0, le=8192)

    def change(self, mask: Tensor) -> Tensor:
        inside = mask[0] > 0.5
        rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        out = torch.zeros_like(mask)
        if len(rows):
            top, left = max(0, int(rows[0]) - self.margin), max(0, int(columns[0]) - self.margin)
            out[0, top : int(rows[-1]) + self.margin + 1, left : int(columns[-1]) + self.margin + 1] = 1.0
        return out
