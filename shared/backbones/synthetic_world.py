"""Facts about a model whose pictures show a synthetic world."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Facts that a backbone provides (`Backbone.world`), so that no other code has to check the model's name."""

    overlay: str  # configs/overlays/NAME.yaml adapts recipes to it
    prompts: str  # the prompt set used to judge concepts on it
    instruments: str  # the evaluators trained on it, as named in `shared.metrics.instruments`
    side: int  # pixels; its training pictures are square and of this size
    unseen: str  # completes the warning about other pictures that begins "the pictures of NAME"
    find: tuple[str, str]  # for exported code: an import line, and an expression for the model's folder
