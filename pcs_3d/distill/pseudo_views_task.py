"""Settings for generating pictures of the subject from all around."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pcs_3d.cameras import FOV_DEG, Cameras, look_at_distance
from shared.recipe.tasks import GenerateTask

Angle = Annotated[float, Field(ge=-90, le=90)]


class PseudoViewsTask(GenerateTask):
    """Turns renders of the earlier phase's asset, or of the mesh that the field starts from, into pictures of the
    subject. Some noise is added to each render, which is then denoised with the concept learned so far
    (DreamBooth3D, https://arxiv.org/abs/2303.13508, section 3.2; SDEdit). Later phases can learn from the pictures
    (`sources.NAME.kind=phase_pictures`) and compare renders with them (`references.kind=phase`).

    prompts: the prompts, with {concept}; one picture is made for each prompt and view. If empty, the recipe's prompt is
    used. Words that describe the view are added to each prompt.
    num: the number of views, evenly spaced around the object, starting at its front.
    elevation_deg: the elevations that the views cycle through.
    strength: the share of the denoising steps that are run. With higher values, pictures look more like the subject and
    less like the render.
    """

    kind: Literal["pseudo_views"] = "pseudo_views"  # pyright: ignore[reportIncompatibleVariableOverride]
    prompts: tuple[str, ...] = ()
    num: Annotated[int, Field(ge=1, le=100_000)] = 20
    elevation_deg: Annotated[tuple[Angle, ...], Field(min_length=1)] = (15.0,)
    fov_deg: Annotated[float, Field(gt=0, lt=180)] = FOV_DEG
    fill: Annotated[float, Field(gt=0, le=2)] = 0.92
    strength: Annotated[float, Field(gt=0, le=1)] = 0.5

    def count(self, steps: int, subjects: int) -> int:
        """Returns the number of steps, which is one per batch of pictures."""
        return -(-self.num * max(1, len(self.prompts)) // self.batch_size)

    def cameras(self) -> Cameras:
        """Returns the camera of each view."""
        azimuths = [360 * i / self.num for i in range(self.num)]
        elevations = [self.elevation_deg[i % len(self.elevation_deg)] for i in range(self.num)]
        return Cameras.of(azimuths, elevations, look_at_distance(self.fov_deg, self.fill), self.fov_deg)
