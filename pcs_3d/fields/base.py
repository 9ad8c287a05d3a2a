"""Base classes for fields and their settings."""

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
    """Base class for field settings.

    bound: half the side length of the cube around the object, in object radii.
    start: the field's contents before the first step.
    lr: the learning rate of the shape.
    lr_features: the learning rate of the colours. If null, `lr` is used.
    """

    drawn_by: ClassVar[str] = "volume"  # the kind of renderer that can render the field
    bound: Length = 1.1
    start: Start = Blob()
    lr: Rate = 1e-2
    lr_features: Rate | None = None

    @property
    def feature_rate(self) -> float:
        """The learning rate of the colours."""
        return self.lr if self.lr_features is None else self.lr_features

    def within(self, regions: Mapping[str, Any]) -> FieldPart:
        """Returns these settings. If they have a `regions` setting that is empty, it is filled with `regions`, the
        guidance's regions by name."""
        return self

    def check(self) -> None:
        """Raises ValueError if the field starts from a file that cannot be read."""
        self.start.check()

    def build(self, channels: int = 3, seed: int = 0) -> Any:
        """Builds the field on the CPU. `channels` is 3 for colours, and otherwise the number of latent channels. Raises
        ValueError if the field starts from a file that cannot be read."""
        raise NotImplementedError


class BaseField(nn.Module):
    """Base class for fields. The state of a field consists of its parameters and buffers."""

    def __init__(self, bound: float, channels: int) -> None:
        super().__init__()
        self.bound, self.channels = bound, channels

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def trained(self) -> list[tuple[str, list[nn.Parameter], float]]:
        """Returns the name, the parameters and the learning rate of each trained part."""
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
            raise ValueError(
                f"the saved state belongs to a different field: only one of the two fields has {', '.join(wrong)}"
            )
        for name, value in mine.items():
            if value.shape != state[name].shape:
                raise ValueError(
                    f"the saved {name} has shape {list(state[name].shape)}, but the field's {name} has shape "
                    f"{list(value.shape)}"
                )
        with torch.no_grad():
            for name, value in mine.items():
                value.copy_(state[name])

    def colored(self, raw: Tensor) -> Tensor:
        """Converts unbounded values to features. Colours are mapped to [0, 1], and latents are returned unchanged."""
        return raw.sigmoid() if self.channels == 3 else raw

    def inside(self, points: Tensor) -> Tensor:
        """Returns whether each point (`[..., 3]`) is within the bound, as bool `[...]`."""
        return (points.abs() <= self.bound).all(-1)


class BaseVolume(BaseField):
    """Base class for fields that can be evaluated at any point."""

    normal_step = 1e-2  # step size of the finite differences, as a share of the bound

    def at(self, points: Tensor) -> Sample:
        raise NotImplementedError

    def density(self, points: Tensor) -> Tensor:
        return self.at(points).density

    def between(self, origins: Tensor, directions: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
        density = self.density(origins[:, None] + distances[..., None] * directions[:, None])
        return density, density

    def normals(self, points: Tensor) -> Tensor:
        """Computes normals from finite differences of the density at the corners of a tetrahedron. This takes four
        evaluations instead of six. It also needs no second derivatives, which `trilinear` does not support."""
        corners = points.new_tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
        step = self.normal_step * self.bound
        values = self.density(points[..., None, :] + step * corners)
        return unit(-(values[..., None] * corners).sum(-2))


def unit(vectors: Tensor) -> Tensor:
    """Scales vectors (`[..., 3]`) to length 1. A zero vector stays 0 and has a gradient of 0."""
    squared = vectors.square().sum(-1, keepdim=True)
    return torch.where(squared > 1e-24, vectors * squared.clamp_min(1e-24).rsqrt(), torch.zeros_like(vectors))
