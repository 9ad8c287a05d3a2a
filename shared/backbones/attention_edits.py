"""Edits to attention, which `Backbone.attending` applies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from shared.backbones.attention_rows import Rows
from shared.backbones.attention_sites import Site, Where


class Edit(Protocol):
    """Changes the inputs of an attention layer's computation."""

    def __call__(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Returns the changed q ([B, H, Lq, d]), k and v ([B, H, Lk, d]), and the bias that is added to the scores
        before the softmax ([B or 1, H or 1, Lq or 1, Lk], or None). Lk is the only size that may change. When a forward
        pass is recomputed, the edit is called again with the same arguments."""
        ...


@dataclass(frozen=True)
class At:
    """An edit that applies only at certain sites. All other sites keep their own fast computation."""

    edit: Edit
    where: Where
