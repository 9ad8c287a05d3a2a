"""The base class for penalties on fields, and the penalties' inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator
from torch import Generator, Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.fields.field import VolumeField
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from pcs_3d.schedules import Moment, Schedule
from shared.config import KindPart


@dataclass(frozen=True)
class Pictures:
    """R pictures of the object with known cameras.

    pixels: [R, 3, H, W] in [0, 1].
    masks: [R, 1, H, W], or None.
    """

    pixels: Tensor
    cameras: Cameras
    masks: Tensor | None = None

    def to(self, device: torch.device | str) -> Pictures:
        """Returns these pictures, moved to a device."""
        masks = None if self.masks is None else self.masks.to(device)
        return Pictures(self.pixels.to(device), self.cameras.to(device), masks)


_ONLY = Moment(0, 1)


@dataclass(frozen=True)
class Seen:
    """The views of one step, and everything else that penalties can use.

    generator: the source of the step's random numbers.
    draw: a function that renders the field from other cameras with the same renderer.
    settings: the settings with which these views were rendered.
    pictures: reference pictures of the object.
    """

    field: Any
    cameras: Cameras
    rendering: Rendering
    moment: Moment = _ONLY
    generator: Generator | None = None
    draw: Callable[[Cameras, RenderSettings], Rendering] | None = None
    settings: RenderSettings | None = None
    pictures: Pictures | None = None


def _not_negative(schedule: Any) -> Any:
    values = (schedule,) if isinstance(schedule, int | float) else (schedule[1], *schedule[2::2])
    if min(values) < 0:
        raise ValueError("a weight must not be negative")
    return schedule


Weight = Annotated[Schedule, AfterValidator(_not_negative)]


class GeometryPenalty(KindPart):
    """A scalar that is added to a step's loss. It is the penalty's value times the penalty's weight at that step."""

    needs_normals: ClassVar[bool] = False  # whether the penalty needs views rendered with normals
    needs_pictures: ClassVar[bool] = False  # whether the penalty needs pictures with known cameras (`references`)
    needs_masks: ClassVar[bool] = False  # whether the penalty needs masks for all of these pictures
    weight: Weight = 1.0  # factor by which the value is multiplied; it can change over the run

    def __call__(self, seen: Seen) -> Tensor:
        """Returns the weighted scalar. If the weight is 0, the value is not computed."""
        weight = seen.moment.of(self.weight)
        if weight == 0:
            return seen.rendering.pixels.new_zeros(())
        return weight * self.value(seen)

    def value(self, seen: Seen) -> Tensor:
        """Returns the unweighted scalar. Raises ValueError if the field or the renderer lacks something that the
        penalty needs."""
        raise NotImplementedError

    def missing(self, what: str) -> ValueError:
        """Returns the error for a missing requirement."""
        return ValueError(f"penalties: {self.kind} needs {what}")


def seen_points(penalty: GeometryPenalty, seen: Seen, count: int) -> tuple[Tensor, Tensor]:
    """Draws random points in the parts of the field that the views show. Samples along rays are drawn with
    probabilities proportional to their weights.

    Returns:
        The points, and the unit directions in which they are seen, both [count, 3] and without gradients. If the views
        are empty, both are [0, 3].
    """
    rendering = seen.rendering
    if rendering.weights is None or rendering.distances is None or not isinstance(seen.field, VolumeField):
        raise penalty.missing("a field rendered by marching rays (renderer.kind=volume)")
    weights = rendering.weights.detach().reshape(-1)
    origins, directions = (r.reshape(-1, 3) for r in seen.cameras.rays(*rendering.pixels.shape[-2:]))
    total = weights.cumsum(0)
    if not total[-1] > 0:
        return origins[:0], directions[:0]
    drawn = torch.rand(
        count, generator=seen.generator, device="cpu" if seen.generator is None else seen.generator.device
    )
    which = torch.searchsorted(total, drawn.to(total) * total[-1]).clamp(max=len(weights) - 1)
    ray = which // rendering.weights.shape[-1]
    return origins[ray] + rendering.distances.reshape(-1)[which, None] * directions[ray], directions[ray]
