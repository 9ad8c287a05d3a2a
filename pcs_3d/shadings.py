"""Draws the shading and the lights for the views of one step."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.renderers.rendering import Shading
from pcs_3d.schedules import Moment, Schedule
from shared.config import NotNegative, Part


class Shadings(Part):
    """The proportions of steps with each kind of shading (DreamFusion, section 3.2). The light is near the camera. The
    three proportions are normalised to probabilities."""

    lambertian: Schedule = 0.0  # proportion of steps with Lambertian shading of the colours
    textureless: Schedule = 0.0  # proportion of steps with Lambertian shading of white, which shows only the shape
    ambient: Schedule = 1.0  # proportion of steps with unlit colours
    spread: NotNegative = 1.0  # standard deviation of the light's position around the camera, in radii

    def draw(self, cameras: Cameras, moment: Moment, generator: Generator) -> tuple[Shading, Tensor]:
        """Draws one shading for all views, and a light position for each view (`[B, 3]`). Raises ValueError if all
        proportions are 0 or any is negative."""
        parts = torch.tensor([moment.of(s) for s in (self.ambient, self.lambertian, self.textureless)])
        if bool((parts < 0).any()) or float(parts.sum()) <= 0:
            raise ValueError(
                f"shading: {parts.tolist()} are not valid proportions of ambient, lambertian and textureless: give "
                "numbers of at least 0, with at least one above 0"
            )
        chosen = int(torch.multinomial(parts, 1, generator=generator))
        light = cameras.positions + self.spread * torch.randn(len(cameras), 3, generator=generator)
        kinds: tuple[Shading, ...] = ("albedo", "lambertian", "textureless")
        return kinds[chosen], light
