"""Makes each frame of a clip attend to other frames in self-attention."""

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
    """Makes each frame's queries attend to the concatenated keys and values of the first and the previous frame
    (Tune-A-Video, https://arxiv.org/abs/2212.11565, section 4.1). For the first frame, the previous frame is the first
    frame itself.

    `frames: [first]` is LAMP's attention (https://arxiv.org/abs/2310.10769). With `frames: [own, previous]`, each frame
    attends to itself and to the previous frame. Pictures and models with joint space-time attention are left unchanged.
    """

    kind: Literal["sparse_causal"] = "sparse_causal"
    frames: Annotated[tuple[Seen, ...], Field(min_length=1, max_length=3)] = (
        "first",
        "previous",
    )  # the frames attended to

    @property
    def taxonomy(self) -> str:
        return "sparse-causal attention"

    def edits(self, backbone: Backbone) -> Sequence[At]:
        return (At(self, Where(kinds=frozenset({"self"}))),) if backbone.frames_apart else ()

    def port(self, backbone: Backbone) -> str:
        """Returns a description of what replaces the part on this model, or "". Raises ValueError if the model
        generates pictures."""
        if backbone.frames is None:
            raise ValueError(
                f"attention.sparse_causal: {backbone.name} generates pictures, which have no previous frame; remove the part "
                "(attention=null)"
            )
        if backbone.frames_apart:
            return ""
        return f"attention.sparse_causal: unchanged in {backbone.family}, where every position attends to all frames"

    def __call__(
        self, site: Site, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Rows
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Replaces the k and v of each frame ([B * F, H, L, d]) with those of the n frames that it attends to
        ([B * F, H, n L, d]). See `Edit`."""
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
