"""The contract between the loop and the task of a phase."""

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
    groups: tuple[str, ...] | None = None  # the optimizer groups that it trains; None for all
    parts: Mapping[str, float | Tensor] = field(default_factory=dict)  # the terms of the loss, for the log


@dataclass(frozen=True)
class Regrouped:
    """The new set of trained parameters, from a certain step onwards.

    `came_from` maps each new parameter to the parameter that it replaces and to an int64 tensor [N]. For each new row,
    the tensor contains the index of the old row that it continues, or -1. A row that continues an old one keeps its
    optimizer state; a row with -1 starts with none.
    """

    groups: Mapping[str, Sequence[TrainableGroup]]
    came_from: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)


#: A generator of the losses of one micro-batch, in order. The loop closes it if it stops early.
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
    """The work of a phase, in numbered steps.

    A task owns data and losses; the loop owns time, gradients and optimizers.

    Methods are called in this order: `load_state_dict` (if the run is resumed), `groups`, then for each step
    `regrouped` and `updates`, and finally `result`. `state_dict` and `carried` may be called between any two steps.
    """

    steps: int  # the task's total number of steps
    rate_key: str  # the recipe key that sets the learning rate

    @property
    def networks_in_steps(self) -> frozenset[str]:
        """Those of the autoencoder ("vae") and the text encoders that the steps use.

        On a GPU, the others are offloaded.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned. Raises ValueError when tensors are missing, unexpected or misshapen."""
        ...

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Returns what each optimizer group trains; empty for a task that trains nothing."""
        ...

    def regrouped(self, step: int) -> Regrouped | None:
        """Applies what changes with time, and returns the new groups if they changed, otherwise None.

        Called before each step. Groups change when a 3D field splits, for example. A second call for the same step
        must change nothing more, because a run may resume at that step.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns, in fp32 on the CPU, everything that the task has produced so far and could not recompute.

        Checkpoints and the best state consist of this.
        """
        ...

    def carried(self) -> dict[str, Tensor]:
        """Returns, in fp32 on the CPU, what later phases find in `PhaseContext.carried`.

        It comes in addition to everything attached to the backbone, and replaces what an earlier phase left under the
        same prefix (up to the "/").
        """
        ...

    def result(self) -> Any:
        """Produces the phase's result, once all steps are done."""
        ...
