"""Settings for finding where the subject's pictures were taken from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pcs_3d.camera_estimation import Framing, Search
from pcs_3d.cameras import FOV_DEG
from shared.recipe.tasks import TuneTask

Angle = Annotated[float, Field(ge=-89, le=89)]


class ReferenceCamerasTask(TuneTask):
    """Finds the camera of each of the subject's pictures, and crops the picture and its mask to the subject. A later
    phase can compare the field with these crops (`references.kind=phase`). A camera at azimuth 0 sees the front.

    estimator: `renders` compares each picture with renders of the earlier phase's asset (or of the mesh that the field
    starts from). The renders show it from `azimuths` directions at each elevation in `elevation_deg`. The estimator
    then searches around the best match in smaller steps, halving them `refinements` times. `toybox` uses the toybox's
    pose estimator, which works only for the toybox's own pictures.
    near_deg: the approximate azimuth of each picture, in the order of the file names, for the estimator `renders`. 0 is
    the front, 90 the object's left, 180 the back and -90 the object's right. These azimuths help because a first
    asset often looks the same from the front and from the back.
    fill: the share of the crop's side that an object of radius 1 covers.
    """

    kind: Literal["reference_cameras"] = "reference_cameras"  # pyright: ignore[reportIncompatibleVariableOverride]
    estimator: Literal["renders", "toybox"] = "renders"
    azimuths: Annotated[int, Field(ge=4, le=360)] = 24
    elevation_deg: Annotated[tuple[Angle, ...], Field(min_length=1)] = (0.0, 15.0, 30.0, 60.0)
    refinements: Annotated[int, Field(ge=0, le=8)] = 2
    near_deg: tuple[Annotated[float, Field(ge=-360, le=360)], ...] | None = None
    fov_deg: Annotated[float, Field(gt=0, lt=180)] = FOV_DEG
    fill: Annotated[float, Field(gt=0, le=2)] = 0.92

    @model_validator(mode="after")
    def _uses_what_is_set(self) -> ReferenceCamerasTask:
        if self.near_deg is not None and self.estimator != "renders":
            raise ValueError(
                f"near_deg narrows the search of estimator=renders, but estimator = {self.estimator} does not search: "
                "remove near_deg"
            )
        return self

    @property
    def learns_subjects(self) -> bool:
        """Always False, because the phase only reads the subjects' pictures."""
        return False

    @property
    def search(self) -> Search:
        """The cameras that the estimator `renders` compares."""
        return Search(self.azimuths, self.elevation_deg, self.refinements, self.near_deg)

    @property
    def framing(self) -> Framing:
        """The field of view and distance of the cameras."""
        return Framing(self.fov_deg, self.fill)

    def count(self, steps: int, subjects: int) -> int:
        """Returns 1, because one step finds all cameras."""
        return 1
