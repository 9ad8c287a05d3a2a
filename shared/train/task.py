"""The contract between the loop and a phase's task."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from shared.trainable import TrainableGroup


@dataclass(frozen=True)
class Update:
    """One loss of a step. A step may yield several, in order; distillation, for example, alternates between two."""

    loss: Tensor  # scalar
    groups: tuple[str, ...] | None = None  # the optimizer groups that this loss trains; None for all
    parts: Mapping[str, float | Tensor] = field(default_factory=dict)  # the terms of the loss, for the log


@dataclass(frozen=True)
class Regrouped:
    """The parameters that are trained from a certain step onwards.

    `came_from` maps each new parameter to the parameter that it replaces and to an int64 tensor [N]. For each new row,
    the tensor contains the index of the old row that the new one continues, or -1. A row that continues an old row
    takes over its optimizer state. A row with -1 starts without state.
    """

    groups: Mapping[str, Sequence[TrainableGroup]]
    came_from: Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]] = field(default_factory=dict)


#: A generator of one micro-batch's losses, in order. A loop that stops early closes the generator.
Updates = Generator[Update, None, None]


class UpdateSource(Protocol):
    """Provides the losses of each step to the loop."""

    def updates(self, step: int, micro: int) -> Updates:
        """Yields the losses of one micro-batch.

        All random numbers come from `generator(seed, step, micro)`, so that a step can be computed again.

        An update is yielded *inside* the contexts in which its loss was computed (`backbone.active`, `attending`, …).
        These stay open until the loop has run the backward pass. With gradient checkpointing, the layers run again
        during the backward pass, and outside the contexts they would silently compute something else.
        """
        ...


class Task(UpdateSource, Protocol):
    """The work of a phase, in numbered steps.

    A task owns data and losses; the loop owns time, gradients and optimizers.

    Methods are called in this order: `load_state_dict` (if the run is resumed), `groups`, then, for each step,
    `regrouped` and `updates`, and finally `result`. `state_dict` and `carried` may be called between any two steps.
    """

    steps: int  # the task's total number of steps
    rate_key: str  # the recipe key that sets the learning rate

    @property
    def networks_in_steps(self) -> frozenset[str]:
        """Which of the autoencoder ("vae") and the text encoders the steps use, by name.

        On a GPU, the other networks are offloaded.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores what `state_dict` returned. Raises ValueError when tensors are missing, unexpected or misshapen."""
        ...

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Returns the trainable parts of each optimizer group. The result is empty if the task trains nothing."""
        ...

    def regrouped(self, step: int) -> Regrouped | None:
        """Applies changes that are due before this step. Returns the new groups if they have changed, otherwise None.

        Called before each step. Groups change, for example, when the number of Gaussians in a 3D field changes. A
        second call for the same step must have no further effect, because a run may resume at that step.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns, in fp32 on the CPU, everything that the task has produced so far and could not recompute.

        Checkpoints and the best state contain these tensors.
        """
        ...

    def carried(self) -> dict[str, Tensor]:
        """Returns the tensors, in fp32 on the CPU, that later phases find in `PhaseContext.carried`.

        Later phases receive them in addition to everything attached to the backbone. If an earlier phase passed on
        tensors under the same prefix (the part of the key before the "/"), those are replaced.
        """
        ...

    def result(self) -> Any:
        """Produces the phase's result, once all steps are done."""
        ...
