"""What a phase does: the contract between the loop and whatever spends compute on it."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from shared.trainable import TrainableGroup


@dataclass(frozen=True)
class Update:
    """One loss. A step may hold several, in order (distillation alternates)."""

    loss: Tensor  # scalar
    groups: tuple[str, ...] | None = None  # the optimizer groups that it trains; None: all
    parts: Mapping[str, float | Tensor] = field(default_factory=dict)  # what the loss is made of, for the log


@dataclass(frozen=True)
class Regrouped:
    """What is trained from a step on.

    came_from: of a parameter that takes the place of another: which, and int64 [N], which of its rows each row was; -1: a
    new row. What the optimizer keeps of a row goes with it, and begins anew for a new one.
    """

    groups: Mapping[str, Sequence[TrainableGroup]]
    came_from: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)


#: The losses of one micro-batch, in order. A generator: it is closed where it is left early.
Updates = Generator[Update, None, None]


class UpdateSource(Protocol):
    """What the loop takes steps of."""

    def updates(self, step: int, micro: int) -> Updates:
        """The losses of one micro-batch. Anything random derives from `generator(seed, step, micro)`, so that a step can
        be computed again.

        An update is yielded *inside* the contexts that its loss was computed under (`backbone.active`, `attending`, …)
        and stays there until the loop has run its backward pass: with recomputed activations the layers run again in
        the backward pass, and outside of those contexts they would compute something else, without a word.
        """
        ...


class Task(UpdateSource, Protocol):
    """Something that spends compute in numbered steps. It knows its data and its losses; the loop knows time, gradients
    and optimizers. Called in this order: `load_state_dict` (of a run that goes on) -> `groups` -> for each step `regrouped`,
    then `updates` -> `result`; `state_dict` and `carried` at any time between two steps."""

    steps: int  # how many it takes
    rate_key: str  # where a recipe says how fast is learned

    @property
    def networks_in_steps(self) -> frozenset[str]:
        """Of the autoencoder ("vae") and the text encoders, those that the steps use; on a GPU the others make room."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when tensors are missing, left over or of another shape."""
        ...

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Optimizer group -> what it trains; empty for a task that trains nothing."""
        ...

    def regrouped(self, step: int) -> Regrouped | None:
        """Before a step: what changes with time, and the groups where they are others now (a field has split, say); None
        where they are as before. Asked again for the same step, it changes nothing more: a run may resume there."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that the task has made so far and cannot make again, fp32, on the CPU; what a checkpoint and the best state
        hold."""
        ...

    def carried(self) -> dict[str, Tensor]:
        """What later phases find in `PhaseContext.carried` besides all that is attached to the backbone, fp32, on the CPU. What
        an earlier phase left under the same first name (up to the "/") goes."""
        ...

    def result(self) -> Any:
        """What the next phase finds, once all steps are done."""
        ...
