"""The path of a motion, as stored in recipes and concepts. Importing this module loads no model library."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shared.config import Part

Offset = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
#: The offsets to the right and downwards, as fractions of the width and height, and the natural logarithm of the scale.
Waypoint = tuple[Offset, Offset, Offset]


class Trajectory(Part):
    """The path of a motion's subject, and the point in sampling at which the subject is moved onto it."""

    start: Annotated[float, Field(ge=0, le=1)] = 0.4  # the subject is moved after this fraction of the denoising steps
    # with "image", models that have separate motion layers skip these layers when they generate clips along the path
    layers: Literal["image", "all"] = "all"
    # one per frame, relative to their mean; if empty, the points are measured from the clips
    points: Annotated[tuple[Waypoint, ...], Field(max_length=10_000)] = ()

    def scaled(self, factor: float) -> Trajectory:
        """Returns the trajectory with every offset multiplied by `factor`, within the allowed range."""
        points = tuple(tuple(max(-2.0, min(2.0, factor * v)) for v in point) for point in self.points)
        return self.model_copy(update={"points": points})
