"""The base class of parts that change attention."""

from __future__ import annotations

from collections.abc import Sequence

from shared.backbones.attention_edits import At
from shared.backbones.protocol import Backbone
from shared.config import KindPart


class AttentionPart(KindPart):
    """The base class of every part that changes how a model attends."""

    def edits(self, backbone: Backbone) -> Sequence[At]:
        """Returns the edits for this model. The sequence is empty if nothing needs to change."""
        raise NotImplementedError

    def port(self, backbone: Backbone) -> str:
        """Returns a description of what replaces the part on this model, for the concept's record. Returns "" if the
        part works as in its paper. Raises ValueError if nothing can replace it."""
        raise NotImplementedError
