"""What trainable parts have in common, how they find what they adapt, and what they return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, model_validator
from torch import nn

from shared.backbones.protocol import Backbone
from shared.config import NAME, KindPart

MAIN = "main"  # the optimizer group of parts that name none


#: A learning rate: what is larger than this overflows in one step, and is a slip of the finger.
Rate = Annotated[float, Field(gt=0, le=1e30, allow_inf_nan=False)]


class TrainablePart(KindPart):
    """Base of every part that injects or unfreezes parameters."""

    lr: Rate = 1e-4
    group: Annotated[str, Field(pattern=NAME)] = MAIN  # the optimizer that trains it: train.optimizers.GROUP
    adapter_set: Annotated[str, Field(pattern=f"({NAME})|^$")] = (
        ""  # what its adapters are switched by; "": the concept
    )
    weight_decay: Annotated[float, Field(ge=0)] | None = None  # None: the optimizer's
    per_source: bool = (
        False  # one adapter for each picture or clip, on while that one is learned; no part of the concept
    )

    @model_validator(mode="after")
    def _one_name(self) -> TrainablePart:
        if self.per_source and self.adapter_set:
            raise ValueError("per_source: each picture or clip has a set of its own; leave out adapter_set")
        return self

    @property
    def places(self) -> tuple[str, ...]:
        """The roles of what it trains; none where that is not named by role."""
        return ()


class OnRoles(TrainablePart):
    """Base of the parts that act on the modules of some roles."""

    roles: Annotated[tuple[str, ...], Field(min_length=1)]

    @property
    def places(self) -> tuple[str, ...]:
        return self.roles


@dataclass(frozen=True)
class TrainableGroup:
    """Parameters that a part injected or unfroze, and what follows from training them."""

    slot: str
    parameters: list[nn.Parameter]
    lr: float
    weight_decay: float | None = None  # None: the optimizer's
    touches_text: bool = False  # the text context changes while training: do not cache it
    group: str = MAIN  # of optimizers
    ports: tuple[str, ...] = ()  # roles that resolved to a stand-in; recorded in the concept


def modules_of(backbone: Backbone, roles: Sequence[str]) -> tuple[dict[str, list[str]], tuple[str, ...]]:
    """Component -> dotted names of the modules that the roles name there, sorted; and a note for each port."""
    targets: dict[str, set[str]] = {}
    notes = []
    for role in roles:
        for group in backbone.group(role):
            targets.setdefault(group.component, set()).update(group.modules)
            if group.resolution == "port":
                notes.append(f"{role}: {group.note}")
    return {component: sorted(modules) for component, modules in targets.items()}, tuple(notes)
