"""What penalties on a thing in space see, and how their weights change over a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import AfterValidator
from torch import Generator, Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.fields.field import VolumeField
from pcs_3d.renderers.rendering import Rendering, RenderSettings
from shared.config import KindPart


@dataclass(frozen=True)
class Pictures:
    """R pictures of the thing whose cameras are known: pixels [R, 3, H, W] in [0, 1], masks [R, 1, H, W] or None."""

    pixels: Tensor
    cameras: Cameras
    masks: Tensor | None = None


@dataclass(frozen=True)
class Views:
    """What a step has drawn. draw: renders the field from other cameras, as the step does; pictures: of the thing; masks
    [B, 1, H, W]: where the thing should be in these views, if that is known; generator: of this step."""

    field: Any
    cameras: Cameras
    rendering: Rendering
    step: int = 0
    steps: int = 1
    generator: Generator | None = None
    draw: Any = None  # (Cameras, RenderSettings) -> Rendering
    settings: RenderSettings | None = None
    pictures: Pictures | None = None
    masks: Tensor | None = None


def _schedule(value: Any) -> Any:
    if isinstance(value, tuple):
        start, _, _, end = value
        if not 0 <= start < end:
            raise ValueError(
                "a schedule is [first step, weight there, weight at the last step, last step], in this order"
            )
    elif value < 0:
        raise ValueError("a weight is not negative")
    return value


#: A weight, or [first step, weight up to it, weight from the last step on, last step], linear between; both ends as numbers
#: of steps where the last is above 1, else as shares of all steps.
Weight = Annotated[float | tuple[float, float, float, float], AfterValidator(_schedule)]


def weight_at(weight: Any, step: int, steps: int) -> float:
    """A weight at a step."""
    if not isinstance(weight, tuple):
        return float(weight)
    start, first, last, end = weight
    scale = steps if end <= 1 else 1
    share = (step - start * scale) / ((end - start) * scale)
    return first + (last - first) * min(1.0, max(0.0, share))


class GeometryPenalty(KindPart):
    """A scalar added to the loss of a step: its weight at that step times its value."""

    needs_normals: ClassVar[bool] = False  # views are drawn with normals
    needs_pictures: ClassVar[bool] = False  # pictures with cameras are given
    weight: Weight = 1.0

    def __call__(self, views: Views) -> Tensor:
        """The weighted scalar; 0 without a look at anything where the weight is 0."""
        weight = weight_at(self.weight, views.step, views.steps)
        if weight == 0:
            return views.rendering.pixels.new_zeros(())
        return weight * self.value(views)

    def value(self, views: Views) -> Tensor:
        """The scalar. ValueError for a field or a renderer that has not what it looks at."""
        raise NotImplementedError

    def missing(self, what: str) -> ValueError:
        """The error for what is not there."""
        return ValueError(f"regularize: {self.kind} needs {what}")


def seen_points(penalty: GeometryPenalty, views: Views, count: int) -> tuple[Tensor, Tensor]:
    """Points [count, 3] drawn from what the views show, each sample of a ray as probable as it weighs, and the unit directions
    [count, 3] they are seen along. Without gradient. None of an empty view: [0, 3]."""
    rendering = views.rendering
    if rendering.weights is None or rendering.distances is None or not isinstance(views.field, VolumeField):
        raise penalty.missing("a field that rays are marched through (renderer.kind=volume)")
    weights = rendering.weights.detach().reshape(-1)
    origins, directions = (r.reshape(-1, 3) for r in views.cameras.rays(*rendering.pixels.shape[-2:]))
    total = weights.cumsum(0)
    if not total[-1] > 0:
        return origins[:0], directions[:0]
    drawn = torch.rand(
        count, generator=views.generator, device="cpu" if views.generator is None else views.generator.device
    )
    which = torch.searchsorted(total, drawn.to(total) * total[-1]).clamp(max=len(weights) - 1)
    ray = which // rendering.weights.shape[-1]
    return origins[ray] + rendering.distances.reshape(-1)[which, None] * directions[ray], directions[ray]
