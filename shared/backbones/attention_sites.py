"""Describes and selects a model's attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["cross", "self", "joint", "temporal"]


@dataclass(frozen=True)
class Site:
    """One attention layer.

    Its kind states what attends to what: the picture to the text ("cross"), the picture to itself ("self"), picture and text
    jointly to both ("joint"), or frames to one another ("temporal").
    """

    name: str  # dotted path in the denoiser
    kind: Kind
    scale: int  # the side length of the latent grid divided by that of this layer's grid

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the number of rows and columns in the layer's query grid for latents of this height and width. Both are
        rounded up."""
        return -(-height // self.scale), -(-width // self.scale)


@dataclass(frozen=True)
class Where:
    """Selects the sites of a backbone that meet every condition. A field that is None imposes no condition."""

    sites: frozenset[str] | None = None  # site names
    kinds: frozenset[Kind] | None = None
    scales: frozenset[int] | None = None

    def __contains__(self, site: Site) -> bool:
        chosen = ((self.sites, site.name), (self.kinds, site.kind), (self.scales, site.scale))
        return all(among is None or value in among for among, value in chosen)

    def __str__(self) -> str:
        chosen = (("name", self.sites), ("kind", self.kinds), ("scale", self.scales))
        clauses = (f"{what} {' or '.join(map(str, sorted(among)))}" for what, among in chosen if among is not None)
        return " and ".join(clauses) or "any"
