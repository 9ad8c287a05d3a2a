"""What a trainable part returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TrainableGroup:
    """Parameters that a part injected or woke, and what follows from training them."""

    slot: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float | None = None  # None: the optimizer's
    touches_text: bool = False  # the text context changes while training: do not cache it
    ports: tuple[str, ...] = ()  # roles that resolved to a stand-in; recorded in the concept
