"""Pictures of the subject from all around, as a recipe asks for them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pcs_3d.cameras import FOV_DEG, Cameras, look_at_distance
from shared.recipe.tasks import GenerateTask

Angle = Annotated[float, Field(ge=-90, le=90)]


class PseudoViewsTask(GenerateTask):
    """Renders of the earlier phase's asset, turned into pictures of the subject: some noise is added and taken away again with
    the concept as it is by now (DreamBooth3D, https://arxiv.org/abs/2303.13508, section 3.2; SDEdit). A later phase learns from
    them (`sources.NAME.kind=phase_pictures`) and compares with them (`references.kind=phase`).

    num: views, evenly around the thing, the first at its front, with these elevations in turn; strength: the share of the
    denoising steps that are taken: with more of it they look more like the subject and less like the render. prompts: of each
    view, with {concept}; none: the recipe's prompt. Both get the words for the view.
    """

    kind: Literal["pseudo_views"] = "pseudo_views"  # pyright: ignore[reportIncompatibleVariableOverride]
    prompts: tuple[str, ...] = ()
    num: Annotated[int, Field(ge=1)] = 20
    elevation_deg: Annotated[tuple[Angle, ...], Field(min_length=1)] = (15.0,)
    fov_deg: Annotated[float, Field(gt=0, lt=180)] = FOV_DEG
    fill: Annotated[float, Field(gt=0, le=2)] = 0.92
    strength: Annotated[float, Field(gt=0, le=1)] = 0.5

    def count(self, steps: int, subjects: int) -> int:
        """How many steps it takes: one for each batch of pictures."""
        return -(-self.num * max(1, len(self.prompts)) // self.batch_size)

    def cameras(self) -> Cameras:
        """From where each view is seen."""
        azimuths = [360 * i / self.num for i in range(self.num)]
        elevations = [self.elevation_deg[i % len(self.elevation_deg)] for i in range(self.num)]
        return Cameras.of(azimuths, elevations, look_at_distance(self.fov_deg, self.fill), self.fov_deg)
