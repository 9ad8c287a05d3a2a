"""What a phase does: the contract between the loop and a task."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from shared.trainable import TrainableGroup


@dataclass(frozen=True)
class Update:
    """One loss. A step may have several, in order (distillation alternates between losses)."""

    loss: Tensor  # scalar
    groups: tuple[str, ...] | None = None  # the optimizer groups that it trains; None: all
    parts: Mapping[str, float | Tensor] = field(default_factory=dict)  # the terms of the loss, for the log


@dataclass(frozen=True)
class Regrouped:
    """The new set of trained parameters, from a certain step on.

    came_from: new parameter -> the parameter it replaces, and int64 [N]: for each new row, the index of the old row that it
    continues, or -1. A continued row keeps its optimizer state; a row with -1 starts with none.
    """

    groups: Mapping[str, Sequence[TrainableGroup]]
    came_from: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)


#: The losses of one micro-batch, in order. A generator; the loop closes it if it stops early.
Updates = Generator[Update, None, None]


class UpdateSource(Protocol):
    """Provides the losses of each step to the loop."""

    def updates(self, step: int, micro: int) -> Updates:
        """Yields the losses of one micro-batch. All randomness derives from `generator(seed, step, micro)`, so a step can be
        computed again.

        An update is yielded *inside* the contexts its loss was computed under (`backbone.active`, `attending`, …), which
        stay open until the loop has run its backward pass. With gradient checkpointing the layers run again in the
        backward pass, and outside those contexts they would silently compute something else.
        """
        ...


class Task(UpdateSource, Protocol):
    """The work of a phase, in numbered steps. It owns data and losses; the loop owns time, gradients and optimizers. Methods
    are called in this order: `load_state_dict` (if the run is resumed) -> `groups` -> for each step `regrouped`, then `updates`
    -> `result`; `state_dict` and `carried` may be called between any two steps."""

    steps: int  # the task's total number of steps
    rate_key: str  # the recipe key that sets the learning rate

    @property
    def networks_in_steps(self) -> frozenset[str]:
        """Which of the autoencoder ("vae") and the text encoders the steps use; on a GPU the others are offloaded."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when tensors are missing, unexpected or of the wrong shape."""
        ...

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Returns optimizer group -> what it trains; empty for a task that trains nothing."""
        ...

    def regrouped(self, step: int) -> Regrouped | None:
        """Called before a step: applies what changes with time, and returns the new groups if they changed, else None.

        Groups change when a 3D field splits, for example. A second call for the same step changes nothing more, because a run
        may resume there.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns everything that the task has produced so far and could not recompute, for checkpoints and the best state:
        in fp32 on the CPU."""
        ...

    def carried(self) -> dict[str, Tensor]:
        """Returns what later phases find in `PhaseContext.carried`, in addition to everything attached to the backbone: in
        fp32 on the CPU. It replaces what an earlier phase left under the same prefix (up to the "/")."""
        ...

    def result(self) -> Any:
        """Produces the phase's result, once all steps are done."""
        ...
