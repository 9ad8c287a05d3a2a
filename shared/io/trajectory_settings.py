"""The path of a motion, as recipes and concepts store it. Importing it loads no model library."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shared.config import Part

Offset = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
#: Right and down, as fractions of the width and height, and the natural logarithm of the size.
Waypoint = tuple[Offset, Offset, Offset]


class Trajectory(Part):
    """Where the subject of a motion goes, and when in sampling it is moved there."""

    start: Annotated[float, Field(ge=0, le=1)] = 0.2  # fraction of the steps done when the latents are shifted
    # one per frame, relative to their mean; (): measured on the clips
    points: Annotated[tuple[Waypoint, ...], Field(max_length=10_000)] = ()

    def scaled(self, factor: float) -> Trajectory:
        """Returns the trajectory with every offset multiplied by `factor`, within the allowed range."""
        points = tuple(tuple(max(-2.0, min(2.0, factor * v)) for v in point) for point in self.points)
        return self.model_copy(update={"points": points})
