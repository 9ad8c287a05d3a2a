"""Attention within frames that looks at other frames of the clip instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.attention.base import AttentionPart
from shared.backbones.attention_edits import At
from shared.backbones.attention_rows import Rows
from shared.backbones.attention_sites import Site, Where
from shared.backbones.protocol import Backbone

Seen = Literal["first", "previous", "own"]


class SparseCausal(AttentionPart):
    """Self-attention in which the queries of each frame meet the keys and values of other frames, side by side: of the first
    and of the one before (Tune-A-Video, https://arxiv.org/abs/2212.11565, section 4.1). Before the first frame is the first.

    `frames: [first]` is the attention of LAMP (https://arxiv.org/abs/2310.10769), `[own, previous]` keeps what a frame sees of
    itself. A picture has one frame and is left as it is, and so is a model in which places attend to all frames at once.
    """

    kind: Literal["sparse_causal"] = "sparse_causal"
    frames: Annotated[tuple[Seen, ...], Field(min_length=1, max_length=3)] = (
        "first",
        "previous",
    )  # whose keys and values

    @property
    def taxonomy(self) -> str:
        return "sparse-causal attention"

    def edits(self, backbone: Backbone) -> Sequence[At]:
        return (At(self, Where(kinds=frozenset({"self"}))),) if _sees_frames_apart(backbone) else ()

    def port(self, backbone: Backbone) -> str:
        """Raises ValueError for a model of pictures."""
        if backbone.frames is None:
            raise ValueError(
                f"attention.sparse_causal: {backbone.name} makes pictures, which have no frame before; leave it out "
                "(attention=null)"
            )
        if _sees_frames_apart(backbone):
            return ""
        return f"attention.sparse_causal: in {backbone.family} every place attends to all frames at once, and goes on doing so"

    def __call__(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Edit`: k and v [B * F, H, L, d] -> [B * F, H, n L, d], of the n frames that each looks at."""
        frames = rows.repeat
        if frames == 1:
            return q, k, v, bias
        number = torch.arange(frames, device=k.device)
        seen = {"first": torch.zeros_like(number), "previous": (number - 1).clamp_min(0), "own": number}

        def side_by_side(x: Tensor, axis: int) -> Tensor:
            clips = x.unflatten(0, (-1, frames))
            return torch.cat([clips[:, seen[name]] for name in self.frames], dim=axis).flatten(0, 1)

        if bias is not None:
            bias = torch.cat([bias] * len(self.frames), dim=-1) if len(bias) == 1 else side_by_side(bias, -1)
        return q, side_by_side(k, -2), side_by_side(v, -2), bias


def _sees_frames_apart(backbone: Backbone) -> bool:
    """Whether attention among the places of a frame sees that frame alone: another kind of layer then looks at the others."""
    return any(site.kind == "temporal" for site in backbone.sites())
