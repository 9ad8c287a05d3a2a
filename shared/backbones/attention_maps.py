"""Requests for attention maps, and the maps recorded for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from shared.backbones.attention_sites import Site, Where


@dataclass(frozen=True)
class Watch(Where):
    """Requests the attention maps of some sites. The maps are the softmax probabilities after all edits. They have at
    least float32 precision and are differentiable."""

    heads: Literal["mean", "all"] = "mean"
    #: Which prediction's maps are kept if there are several predictions. "first" is for penalties that make extra
    #: predictions, so that the later ones do not replace the maps that the penalties read. A recomputed forward pass
    #: does not count as a new prediction: its maps overwrite those of the original pass.
    keep: Literal["first", "last"] = "last"


@dataclass(eq=False)
class Record(Mapping[str, Tensor]):
    """Attention maps by site name, in the order of the forward pass. Each map is [B, Lq, Lk], or [B, H, Lq, Lk] with
    `heads="all"`.

    The record is empty until the first prediction. At a joint site, both the queries and the keys are the text tokens
    followed by the picture tokens, row by row.
    """

    sites: Mapping[str, Site]  # the watched sites
    maps: dict[str, Tensor] = field(default_factory=dict)
    passes: dict[str, int | None] = field(default_factory=dict)  # the prediction that each map belongs to

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.maps:
            known = name in self.sites
            raise KeyError(f"{name}: {'nothing has been predicted yet' if known else 'this site is not watched'}")
        return self.maps[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.sites if name in self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __contains__(self, name: object) -> bool:
        return name in self.maps

    def text_map(self, name: str, length: int) -> Tensor:
        """Returns the picture's attention to the text, [B, h*w, L] or [B, H, h*w, L]. At a joint site, this is part of
        the map.

        Args:
            name: a watched site of kind "cross" or "joint"
            length: L, the number of text tokens

        Raises:
            ValueError: for a site of any other kind, because such sites do not attend to text
        """
        kind = self.sites[name].kind
        if kind == "cross":
            return self[name]
        if kind != "joint":
            raise ValueError(f"{name} is {kind} attention, which does not attend to text")
        return self[name][..., length:, :length]
