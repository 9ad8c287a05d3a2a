"""How a thing is lit in a step."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Generator, Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.renderers.rendering import Shading
from pcs_3d.schedules import Moment, Schedule
from shared.config import Part


class Shadings(Part):
    """How a thing is lit in a step: with what probability it is Lambertian, and without its colours (DreamFusion, section
    3.2); else as it is. The light is near the camera."""

    lambertian: Schedule = 0.0
    textureless: Schedule = 0.0
    ambient: Schedule = 1.0  # relative; with the two above, probabilities are in these proportions
    spread: Annotated[float, Field(ge=0)] = 1.0  # of the light around the camera, in radii

    def draw(self, cameras: Cameras, moment: Moment, generator: Generator) -> tuple[Shading, Tensor]:
        """One shading for all views, and a light [B, 3] for each. ValueError where all are impossible."""
        parts = torch.tensor([moment.of(s) for s in (self.ambient, self.lambertian, self.textureless)])
        if bool((parts < 0).any()) or float(parts.sum()) <= 0:
            raise ValueError(f"shading: {parts.tolist()} are no proportions of ambient, lambertian and textureless")
        chosen = int(torch.multinomial(parts, 1, generator=generator))
        light = cameras.positions + self.spread * torch.randn(len(cameras), 3, generator=generator)
        kinds: tuple[Shading, ...] = ("albedo", "lambertian", "textureless")
        return kinds[chosen], light
