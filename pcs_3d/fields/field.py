"""The protocols through which the renderers, the penalties and the export code use fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared.trainable import TrainableGroup


@dataclass(frozen=True)
class Sample:
    """A field's values at points [..., 3].

    density: [...], per object radius, at least 0.
    features: [..., K]; colours in [0, 1] (K = 3), unless the field is rendered in latent space.
    """

    density: Tensor
    features: Tensor


@dataclass(frozen=True)
class Surface:
    """A triangle mesh.

    vertices: [V, 3], in object radii.
    faces: int64 [F, 3], counter-clockwise when seen from outside.
    """

    vertices: Tensor
    faces: Tensor


@dataclass(frozen=True)
class Splats:
    """N Gaussians.

    means: [N, 3], in object radii.
    scales: [N, 3], standard deviations along each Gaussian's axes.
    rotations: [N, 4], unit quaternions with w first.
    opacities: [N], in [0, 1].
    features: [N, K].
    """

    means: Tensor
    scales: Tensor
    rotations: Tensor
    opacities: Tensor
    features: Tensor


#: Maps each new parameter to the old parameter that it replaces and to the old index of each of its rows (int64 [N],
#: with -1 for new rows).
Replaced = Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]]


@runtime_checkable
class Field(Protocol):
    """A 3D object that is learned by gradient descent. It lies within the cube [-bound, bound]³; the space outside is
    empty."""

    bound: float
    channels: int  # K: 3 for colours, or the number of latent channels

    @property
    def device(self) -> torch.device:
        """The device of the field's parameters."""
        ...

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Returns the trained parts of each optimizer group. `advance` may change the groups."""
        ...

    def advance(self, step: int, steps: int) -> Replaced | None:
        """Makes the changes that are due before step `step` of `steps` (finer levels, splitting, pruning). A repeated
        call for the same step has no effect, even if the field has been saved and loaded in between.

        Returns:
            The origin of the new parameters if the groups have changed, and None otherwise.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the complete state, in fp32 on the CPU."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a saved state. Raises ValueError if tensors are missing, unexpected or of the wrong shape."""
        ...

    def to(self, device: torch.device | str) -> Field:
        """Moves the field to a device and returns it."""
        ...


@runtime_checkable
class VolumeField(Field, Protocol):
    """A field that can be evaluated at any point."""

    def at(self, points: Tensor) -> Sample:
        """Returns the density (`[...]`) and features (`[..., K]`) at points (`[..., 3]`), differentiably. The density
        is 0 outside the bound."""
        ...

    def density(self, points: Tensor) -> Tensor:
        """Returns `at(points).density`, computed faster if the field supports this."""
        ...

    def between(self, origins: Tensor, directions: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Returns lower and upper bounds on `density` at S distances along each of N rays, both `[N, S]`. If the field
        supports it, the bounds are cheaper to compute than the density. Samples that the bounds prove to be empty or
        hidden can be skipped.

        Args:
            origins, directions: [N, 3]
            distances: [N, S]
        """
        ...

    def normals(self, points: Tensor) -> Tensor:
        """Returns the unit normals (`[..., 3]`) at points (`[..., 3]`), differentiably. They point in the direction in
        which the density falls fastest."""
        ...


@runtime_checkable
class SurfaceField(Field, Protocol):
    """A field that is rendered as triangles."""

    def surface(self) -> Surface:
        """Returns the field's triangles, which are differentiable with respect to any trained parameters of the shape.
        Raises ValueError if there are no triangles."""
        ...

    def features_at(self, points: Tensor) -> Tensor:
        """Returns the features (`[..., K]`) at points on the surface (`[..., 3]`), differentiably."""
        ...


@runtime_checkable
class SplatField(Field, Protocol):
    """A field that is rendered as Gaussians."""

    def splats(self) -> Splats:
        """Returns the field's Gaussians, differentiably."""
        ...


@runtime_checkable
class GridField(Field, Protocol):
    """A field with values on grids, so that neighbouring values can be compared."""

    def total_variation(self) -> Tensor:
        """Returns the mean squared difference between neighbouring values."""
        ...
