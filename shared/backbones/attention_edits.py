"""What changes attention; `Backbone.attending` applies it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shared.backbones.attention_rows import Rows
from shared.backbones.attention_sites import Site, Where


class Edit(Protocol):
    """Changes what an attention layer computes with."""

    def __call__(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """The same, changed: q [B, H, Lq, d], k and v [B, H, Lk, d], and what is added to the scores before the softmax,
        [B or 1, H or 1, Lq or 1, Lk] or None. Lk may change, the other sizes may not. It runs again, with the same
        arguments, where a forward pass is recomputed."""
        ...


@dataclass(frozen=True)
class At:
    """An edit for some sites only; the others keep their own fast computation."""

    edit: Edit
    where: Where
