"""What every representation offers to what renders, penalises and exports it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from shared.trainable import TrainableGroup


@dataclass(frozen=True)
class Sample:
    """A field at points [..., 3].

    density: [...], per radius of the thing, not negative. features: [..., K], colours in [0, 1] (K = 3) unless the field is
    rendered in latent space.
    """

    density: Tensor
    features: Tensor


@runtime_checkable
class Field(Protocol):
    """A thing in space, learned by gradients. The space is the cube [-bound, bound]³ around the origin; outside is nothing."""

    bound: float

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Optimizer group -> what it trains. They may change in `advance`, which the task then tells the loop."""
        ...

    def advance(self, step: int, steps: int) -> bool:
        """What changes with time (finer levels, splitting, pruning), before step `step` of `steps`; whether `groups` did."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that it is, fp32, on the CPU."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when tensors are missing, left over or of another shape."""
        ...


@runtime_checkable
class VolumeField(Field, Protocol):
    """A field that can be asked at any point."""

    def at(self, points: Tensor) -> Sample:
        """[..., 3] -> density [...] and features [..., K], differentiable; nothing outside of the bound."""
        ...

    def normals(self, points: Tensor) -> Tensor:
        """[..., 3] -> unit vectors [..., 3] against the gradient of the density, differentiable."""
        ...
