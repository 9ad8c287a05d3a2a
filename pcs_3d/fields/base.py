"""Base classes of fields: settings, learning rates, and saving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field as Setting
from torch import Tensor, nn

from pcs_3d.fields.field import Replaced, Sample
from pcs_3d.fields.starts import Blob, Start
from shared.config import KindPart
from shared.trainable import TrainableGroup
from shared.trainable.base import MAIN, Rate

Length = Annotated[float, Setting(gt=0, le=100)]


class FieldPart(KindPart):
    """Base class for the settings of fields.

    bound: half the side of the cube around the object, in the object's radii.
    start: the content before the first step.
    lr: learning rate of the shape.
    lr_features: learning rate of the colours; null: the same as lr.
    """

    drawn_by: ClassVar[str] = "volume"  # the kind of renderer
    bound: Length = 1.1
    start: Start = Blob()
    lr: Rate = 1e-2
    lr_features: Rate | None = None

    @property
    def feature_rate(self) -> float:
        """The learning rate of the colours."""
        return self.lr if self.lr_features is None else self.lr_features

    def within(self, regions: Mapping[str, Any]) -> FieldPart:
        """These settings, with the guidance's regions (by name) filled in if the field depends on them."""
        return self

    def check(self) -> None:
        """Raises ValueError if the file to start from cannot be read."""
        self.start.check()

    def build(self, channels: int = 3, seed: int = 0) -> Any:
        """Builds the field on the CPU. channels: 3 for colours, else the number of latent channels. Raises ValueError if the
        file to start from cannot be read."""
        raise NotImplementedError


class BaseField(nn.Module):
    """Base class for fields. Their parameters and buffers are their state."""

    def __init__(self, bound: float, channels: int) -> None:
        super().__init__()
        self.bound, self.channels = bound, channels

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        """Name, parameters and learning rate of each trained part."""
        raise NotImplementedError

    def groups(self) -> Mapping[str, Sequence[TrainableGroup]]:
        return {MAIN: [TrainableGroup(slot, list(many), rate) for slot, many, rate in self.trained()]}

    def advance(self, step: int, steps: int) -> Replaced | None:
        return None

    def state_dict(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: value.to("cpu", torch.float32, copy=True) for name, value in self._kept().items()}

    def _kept(self) -> dict[str, Tensor]:
        return nn.Module.state_dict(self)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:  # type: ignore[override]
        mine = self._kept()
        if wrong := sorted(mine.keys() ^ state.keys()):
            raise ValueError(f"the saved state belongs to another field: only one of the two has {', '.join(wrong)}")
        for name, value in mine.items():
            if value.shape != state[name].shape:
                raise ValueError(
                    f"the saved {name} is {list(state[name].shape)}, but the field's is {list(value.shape)}"
                )
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(state[name])

    def colored(self, raw: Tensor) -> Tensor:
        """Unbounded values as features: colours in [0, 1]; latents unchanged."""
        return raw.sigmoid() if self.channels == 3 else raw

    def inside(self, points: Tensor) -> Tensor:
        """bool [...]: within the bound."""
        return (points.abs() <= self.bound).all(-1)


class BaseVolume(BaseField):
    """Base class for fields that can be evaluated at any point."""

    normal_step = 1e-2  # step of finite differences, as a share of the bound

    def at(self, points: Tensor) -> Sample:
        raise NotImplementedError

    def density(self, points: Tensor) -> Tensor:
        return self.at(points).density

    def between(self, origins: Tensor, directions: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        density = self.density(origins[:, None] + distances[..., None] * directions[:, None])
        return density, density

    def normals(self, points: Tensor) -> Tensor:
        """Normals from finite differences at the corners of a tetrahedron. This takes four evaluations instead of six, and no
        second derivative, which interpolation does not have."""
        corners = points.new_tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        step = self.normal_step * self.bound
        values = self.density(points[..., None, :] + step * corners)
        return unit(-(values[..., None] * corners).sum(-2))


def unit(vectors: Tensor) -> Tensor:
    """Vectors [..., 3] of length 1; 0 stays 0, with a gradient of 0."""
    squared = vectors.square().sum(-1, keepdim=True)
    return torch.where(squared > 1e-24, vectors * squared.clamp_min(1e-24).rsqrt(), torch.zeros_like(vectors))
