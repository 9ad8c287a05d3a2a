"""The protocols through which renderers, penalties and export use fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from shared.trainable import TrainableGroup


@dataclass(frozen=True)
class Sample:
    """A field at points [..., 3].

    density: [...], per radius of the object, at least 0.
    features: [..., K], colours in [0, 1] (K = 3) unless the field is rendered in latent space.
    """

    density: Tensor
    features: Tensor


@dataclass(frozen=True)
class Surface:
    """Triangles: vertices [V, 3] in radii of the object, faces int64 [F, 3], counter-clockwise when seen from outside."""

    vertices: Tensor
    faces: Tensor


@dataclass(frozen=True)
class Splats:
    """N Gaussians: means [N, 3], scales [N, 3] (standard deviations along the axes), rotations [N, 4] (unit quaternions, w
    first), opacities [N] in [0, 1], features [N, K]."""

    means: Tensor
    scales: Tensor
    rotations: Tensor
    opacities: Tensor
    features: Tensor


#: New parameter -> the old one that it replaces, and the old row that each of its rows comes from (int64 [N], -1: none).
Replaced = Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]]


@runtime_checkable
class Field(Protocol):
    """An object in 3D, learned by gradient descent. It lies within the cube [-bound, bound]³; space outside is empty."""

    bound: float
    channels: int  # K: 3 colours, or the channels of latents

    @property
    def device(self) -> torch.device:
        """The device of the field's parameters."""
        ...

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Optimizer group -> what it trains. The groups may change in `advance`."""
        ...

    def advance(self, step: int, steps: int) -> Replaced | None:
        """Makes the changes due before step `step` of `steps` (finer levels, splitting, pruning). If `groups` have changed,
        returns what their parameters came from, else None. Calling it again for the same step, even after saving and loading
        the field, has no effect."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """The complete state, in fp32 on the CPU."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads a saved state. Raises ValueError if tensors are missing, unexpected or of the wrong shape."""
        ...

    def to(self, device: torch.device | str) -> Field:
        """The same field, moved to a device."""
        ...


@runtime_checkable
class VolumeField(Field, Protocol):
    """A field that can be evaluated at any point."""

    def at(self, points: Tensor) -> Sample:
        """[..., 3] -> density [...] and features [..., K], differentiable; 0 density outside the bound."""
        ...

    def density(self, points: Tensor) -> Tensor:
        """[..., 3] -> [...]: `at(points).density`, but cheaper if the field supports it."""
        ...

    def between(self, origins: Tensor, directions: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper bounds [N, S] on `density` along rays [N, 3], [N, 3] at distances [N, S]; cheaper than evaluating it
        if the field supports this. Samples that the bounds show to be empty or hidden can be skipped."""
        ...

    def normals(self, points: Tensor) -> Tensor:
        """[..., 3] -> unit vectors [..., 3] opposite to the gradient of the density, differentiable."""
        ...


@runtime_checkable
class SurfaceField(Field, Protocol):
    """A field that is drawn as triangles."""

    def surface(self) -> Surface:
        """Its triangles, differentiable in the trained part of its shape. Raises ValueError if there are none."""
        ...

    def features_at(self, points: Tensor) -> Tensor:
        """[..., 3] on the surface -> features [..., K], differentiable."""
        ...


@runtime_checkable
class SplatField(Field, Protocol):
    """A field that is drawn as Gaussians."""

    def splats(self) -> Splats:
        """Its Gaussians, differentiable."""
        ...


@runtime_checkable
class GridField(Field, Protocol):
    """A field with values on grids, so that neighbours can be compared."""

    def total_variation(self) -> Tensor:
        """The mean squared difference between neighbours."""
        ...
