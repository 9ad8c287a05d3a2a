"""What is said about attention: where a layer is, who changes it, who watches it, what was seen.

`shared.backbones.attention` applies all of this; the parts of `shared.attention` are edits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["cross", "self", "joint", "temporal"]


@dataclass(frozen=True)
class Site:
    """One attention layer: where text meets the picture, the picture itself, both at once, or a place its other frames."""

    name: str  # dotted path in the denoiser
    kind: Kind
    scale: int  # how many times smaller than the latent grid it works

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that its queries form for latents of this height and width; odd sides round up."""
        return -(-height // self.scale), -(-width // self.scale)


@dataclass(frozen=True)
class Rows:
    """Which rows of a caller's batch a layer's tensors belong to.

    Along the batch, a layer's tensors hold `len(index) * repeat` entries: each row `repeat` times in a row (once in a
    picture model; once for each frame or place in a model of clips).
    """

    index: tuple[int, ...]  # row of the batch that was asked for; under classifier-free guidance each comes twice
    negative: tuple[bool, ...]  # whether it is told the negative prompt
    repeat: int = 1

    @staticmethod
    def plain(batch: int) -> Rows:
        """Each row once, none of them negative."""
        return Rows(tuple(range(batch)), (False,) * batch)

    @staticmethod
    def guided(batch: int) -> Rows:
        """The negative half first, as `predict_guided` asks for them."""
        return Rows(tuple(range(batch)) * 2, (True,) * batch + (False,) * batch)

    def indices(self, device: torch.device) -> Tensor:
        """int64, one for each entry of the layer's batch."""
        return torch.tensor(self.index, device=device).repeat_interleave(self.repeat)

    def negatives(self, device: torch.device) -> Tensor:
        """bool, one for each entry of the layer's batch."""
        return torch.tensor(self.negative, device=device).repeat_interleave(self.repeat)


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
class Where:
    """Some of a backbone's sites: those that meet every condition that is given."""

    sites: frozenset[str] | None = None  # by name
    kinds: frozenset[Kind] | None = None
    scales: frozenset[int] | None = None

    def __contains__(self, site: Site) -> bool:
        chosen = ((self.sites, site.name), (self.kinds, site.kind), (self.scales, site.scale))
        return all(among is None or value in among for among, value in chosen)

    def __str__(self) -> str:
        chosen = (("name", self.sites), ("kind", self.kinds), ("scale", self.scales))
        clauses = (f"{what} {' or '.join(map(str, sorted(among)))}" for what, among in chosen if among is not None)
        return " and ".join(clauses) or "any"


@dataclass(frozen=True)
class At:
    """An edit for some sites only; the others keep their own fast computation."""

    edit: Edit
    where: Where


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
