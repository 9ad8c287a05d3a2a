"""What attention was seen: the maps that are asked for, and their record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from shared.backbones.attention_sites import Site, Where


@dataclass(frozen=True)
class Watch(Where):
    """Asks for the maps of some sites: the softmax's probabilities, after all edits, float32, differentiable."""

    heads: Literal["mean", "all"] = "mean"
    #: Which prediction's maps stay where several are made: a penalty's own further predictions must not replace what it
    #: is to read. A forward pass that is recomputed for its gradient belongs to no new prediction, and overwrites.
    keep: Literal["first", "last"] = "last"


@dataclass(eq=False)
class Record(Mapping[str, Tensor]):
    """Attention maps by site name, in the order of the forward pass: [B, Lq, Lk], or [B, H, Lq, Lk] with `heads="all"`.

    Empty until something was predicted. Queries of a joint site are its text, then the picture's rows; so are its keys.
    """

    sites: Mapping[str, Site]  # those that are watched
    maps: dict[str, Tensor] = field(default_factory=dict)
    passes: dict[str, int | None] = field(default_factory=dict)  # the prediction that a map is of

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.maps:
            known = name in self.sites
            raise KeyError(f"{name}: {'nothing was predicted yet' if known else 'not a site that is watched'}")
        return self.maps[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.sites if name in self.maps)

    def __len__(self) -> int:
        return len(self.maps)

    def __contains__(self, name: object) -> bool:
        return name in self.maps

    def text_map(self, name: str, length: int) -> Tensor:
        """How the picture looks at the text: [B, h*w, L], or [B, H, h*w, L]; of a joint site, that part of its map.

        Args:
            name: a site that is watched, of kind "cross" or "joint"
            length: L, the tokens of the text context

        Raises:
            ValueError: for a site of another kind, which has no text
        """
        kind = self.sites[name].kind
        if kind == "cross":
            return self[name]
        if kind != "joint":
            raise ValueError(f"{name} is {kind} attention: it does not look at text")
        return self[name][..., length:, :length]
