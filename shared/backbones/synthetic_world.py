"""What is known of a model whose pictures are of a world of its own, not of the real one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """Facts that a backbone states (`Backbone.world`), so that nothing else asks for its name."""

    overlay: str  # configs/overlays/NAME.yaml adapts recipes to it
    prompts: str  # the prompt set that a concept on it is judged by
    instruments: str  # the evaluators that know it, as `shared.metrics.instruments` names them
    side: int  # pixels; what it has seen is square and of this size
    unseen: str  # said of other pictures, after "the pictures of NAME"
    find: tuple[str, str]  # for exported code: (the line that imports it, the expression) that give its folder
