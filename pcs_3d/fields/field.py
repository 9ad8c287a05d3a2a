"""What every representation offers to what renders, penalises and exports it."""

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

    density: [...], per radius of the thing, not negative. features: [..., K], colours in [0, 1] (K = 3) unless the field is
    rendered in latent space.
    """

    density: Tensor
    features: Tensor


@dataclass(frozen=True)
class Surface:
    """Triangles: vertices [V, 3] in radii of the thing, faces int64 [F, 3], counter-clockwise seen from outside."""

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


#: A parameter that takes the place of another: which, and int64 [N], which of its rows each row was, -1: a new one.
Replaced = Mapping[nn.Parameter, tuple[nn.Parameter, Tensor]]


@runtime_checkable
class Field(Protocol):
    """A thing in space, learned by gradients. The space is the cube [-bound, bound]³ around the origin; outside is nothing."""

    bound: float
    channels: int  # K: 3 colours, or the channels of latents

    @property
    def device(self) -> torch.device:
        """Where it is."""
        ...

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        """Optimizer group -> what it trains. They may change in `advance`."""
        ...

    def advance(self, step: int, steps: int) -> Replaced | None:
        """What changes with time (finer levels, splitting, pruning), before step `step` of `steps`. Where `groups` are others
        now, what their parameters came from; else None. Called again for the same step, also after the field was saved and
        loaded, it changes nothing more."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that it is, fp32, on the CPU."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError when tensors are missing, left over or of another shape."""
        ...

    def to(self, device: torch.device | str) -> Field:
        """The same field, moved to a device."""
        ...


@runtime_checkable
class VolumeField(Field, Protocol):
    """A field that can be asked at any point."""

    def at(self, points: Tensor) -> Sample:
        """[..., 3] -> density [...] and features [..., K], differentiable; nothing outside of the bound."""
        ...

    def density(self, points: Tensor) -> Tensor:
        """[..., 3] -> [...]: `at(points).density`, for less where the field can."""
        ...

    def between(self, origins: Tensor, directions: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        """Along rays [N, 3], [N, 3] at distances [N, S]: two densities [N, S] that `density` lies between, for less where the
        field can: what is empty or hidden for certain is not asked again."""
        ...

    def normals(self, points: Tensor) -> Tensor:
        """[..., 3] -> unit vectors [..., 3] against the gradient of the density, differentiable."""
        ...


@runtime_checkable
class SurfaceField(Field, Protocol):
    """A field that is drawn as triangles."""

    def surface(self) -> Surface:
        """Its triangles, differentiable in what it trains of its shape. ValueError where there are none."""
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
    """A field whose values lie on grids, so that neighbours can be compared."""

    def total_variation(self) -> Tensor:
        """The mean squared difference between neighbours."""
        ...
