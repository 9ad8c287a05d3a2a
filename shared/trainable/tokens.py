"""Trains the vectors of learnable tokens (Textual Inversion, https://arxiv.org/abs/2208.01618)."""

from __future__ import annotations

from typing import ClassVar, Literal

from shared.backbones.protocol import Backbone
from shared.config import NotNegative
from shared.trainable.base import Rate, TrainableGroup, TrainablePart


class Tokens(TrainablePart):
    """Trains the token vectors of the concept's modifier.

    The embedding table stays bit-identical, because the new vectors are stored outside it.
    """

    taxonomy: ClassVar[str] = "token embeddings"
    kind: Literal["tokens"] = "tokens"
    lr: Rate = 5e-3  # learning rate
    weight_decay: NotNegative | None = 0.0

    def inject(self, backbone: Backbone, name: str, slot: str, seed: int) -> TrainableGroup:
        """Makes the tokens of all attached concepts trainable, except those of loaded concepts, which are frozen.

        `name` is ignored.

        Raises ValueError if no concept that is being trained has learnable tokens.
        """
        parameters = [
            p
            for placeholder in backbone.placeholders.values()
            if not placeholder.frozen
            for p in placeholder.parameters()
        ]
        if not parameters:
            raise ValueError(
                f"trainable.{slot} trains tokens, but the modifier learns none; use modifier.kind=learnable_token"
            )
        for parameter in parameters:
            parameter.requires_grad_(True)
        return TrainableGroup(slot, parameters, self.lr, self.weight_decay, touches_text=True)
