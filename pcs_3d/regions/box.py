"""A region in the shape of an axis-aligned box."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from pcs_3d.regions.base import Inside, RegionPart
from shared.config import Real

Corner = tuple[Real, Real, Real]


class Box(RegionPart):
    """An axis-aligned box between the corners `lo` and `hi`, like the boxes that users draw in
    https://arxiv.org/abs/2303.12218, section 4."""

    kind: Literal["box"] = "box"
    lo: Corner
    hi: Corner

    @model_validator(mode="after")
    def _has_a_volume(self) -> Box:
        if any(a >= b for a, b in zip(self.lo, self.hi, strict=True)):
            raise ValueError(f"lo = {list(self.lo)} must be below hi = {list(self.hi)} along every axis")
        return self

    def is_outside(self, bound: float) -> bool:
        """Whether the box lies entirely outside the cube from -`bound` to `bound`."""
        return any(low >= bound or high <= -bound for low, high in zip(self.lo, self.hi, strict=True))

    def build(self) -> Inside:
        def inside(points: Tensor) -> Tensor:
            lo, hi = (torch.tensor(c, device=points.device, dtype=points.dtype) for c in (self.lo, self.hi))
            return self.faded(torch.minimum(points - lo, hi - points).amin(-1))

        return inside
