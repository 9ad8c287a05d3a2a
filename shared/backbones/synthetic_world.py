"""Facts about a model that was trained on pictures of a synthetic world."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """The facts that a backbone reports about its synthetic world (`Backbone.world`), so that no code has to check the model's
    name."""

    overlay: str  # the NAME of configs/overlays/NAME.yaml, which adapts recipes to the model
    prompts: str  # the prompt set for evaluating concepts on the model
    instruments: str  # the evaluators trained on this world, as named in `shared.metrics.instruments`
    side: int  # side length of the square training pictures, in pixels
    unseen: str  # completes the warning about pictures from outside this world, which begins "the pictures of NAME"
    find: tuple[str, str]  # for exported code, an import line and an expression that gives the model's folder
