"""Lets a penalty declare that it needs attention maps, which are then recorded during the prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from shared.backbones.attention_maps import Record, Watch
from shared.backbones.attention_sites import Kind
from shared.backbones.protocol import Backbone
from shared.types import Batch, Step


@dataclass(frozen=True)
class AttentionMaps:
    """The attention maps of a step's first prediction. Later predictions in the same step do not replace them.

    Args:
        kinds: the kinds of layers to watch. Kinds that the family lacks are ignored
        scales: the scales to watch. If empty, only the scale at which the shorter side of a layer's grid is
            closest to `cells` is watched
        cells: the target length of the shorter side of a layer's grid, in cells
    """

    kinds: frozenset[Kind] = frozenset({"cross", "joint"})
    scales: frozenset[int] = frozenset()
    cells: int = 16
    name: str = "attention_maps"

    def around(self, backbone: Backbone, batch: Batch) -> AbstractContextManager[Record]:
        """Returns a context that yields the record of the maps. Raises ValueError when the backbone has no such layers."""
        return backbone.attending(Watch(kinds=self.kinds, scales=self._scales(backbone, batch), keep="first"))

    def value(self, step: Step, entered: Record) -> Record:
        return entered

    def _scales(self, backbone: Backbone, batch: Batch) -> frozenset[int] | None:
        sites = [s for s in backbone.sites() if s.kind in self.kinds]
        if self.scales or not sites:
            return self.scales or None
        height, width = batch.latents.shape[-2:]
        return frozenset({min(sites, key=lambda s: abs(min(s.grid(height, width)) - self.cells)).scale})
