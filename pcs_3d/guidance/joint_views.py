"""Lets views of one object attend to each other, as in a multi-view model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from shared.backbones.attention_rows import Rows
from shared.backbones.attention_sites import Site, Where

SELF = Where(kinds=frozenset({"self"}))


@dataclass(frozen=True)
class JointViews:
    """An edit for `Backbone.attending` that joins self-attention over `count` consecutive views. Each position attends
    to all positions in all of these views, as in MVDream (https://arxiv.org/abs/2308.16512, section 3.1). MVDream
    trains a model with this attention, starting from the weights of an image model."""

    count: int

    def __call__(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Joins the k and v of consecutive views into `[B, H, count · L, d]`. Raises ValueError unless B is a multiple
        of `count`."""
        if len(k) % self.count:
            raise ValueError(
                f"guidance.joint_views = {self.count}: the number of views in a step ({len(k)}) must be a multiple of "
                "this value"
            )
        return q, self._joined(k), self._joined(v), bias

    def _joined(self, values: Tensor) -> Tensor:
        b, heads, places, width = values.shape
        groups = values.reshape(b // self.count, self.count, heads, places, width).transpose(1, 2)
        return groups.reshape(-1, heads, self.count * places, width).repeat_interleave(self.count, 0)
