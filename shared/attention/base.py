"""What parts that change attention have in common."""

from __future__ import annotations

from collections.abc import Sequence

from shared.backbones.attention_edits import At
from shared.backbones.protocol import Backbone
from shared.config import KindPart


class AttentionPart(KindPart):
    """Base of every part that changes how a model attends."""

    def edits(self, backbone: Backbone) -> Sequence[At]:
        """What it does on this model; nothing where there is nothing to change."""
        raise NotImplementedError

    def port(self, backbone: Backbone) -> str:
        """What stands in for it on this model, recorded in the concept; "" where it does what its paper says. ValueError
        where nothing does."""
        raise NotImplementedError
