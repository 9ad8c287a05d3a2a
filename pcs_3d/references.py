"""From where the pictures of a subject were taken."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from pcs_3d.cameras import FOV_DEG, Cameras, look_at_distance
from pcs_3d.regularize.base import Pictures
from shared.config import Part
from shared.runner.judging import reference_masks, references
from shared.types import Subject


class References(Part):
    """The cameras of the subject's pictures, in the order of their names. Azimuth 0 shows the front, 90 the thing's left.

    elevation_deg: one for all, or one each; fill: how much of a picture's side a thing of radius 1 takes.
    """

    azimuth_deg: Annotated[tuple[float, ...], Field(min_length=1)]
    elevation_deg: float | tuple[float, ...] = 15.0
    fov_deg: Annotated[float, Field(gt=0, lt=180)] = FOV_DEG
    fill: Annotated[float, Field(gt=0, le=2)] = 0.92

    def cameras(self) -> Cameras:
        """One for each picture. ValueError where there are not as many elevations as azimuths."""
        if isinstance(self.elevation_deg, tuple) and len(self.elevation_deg) != len(self.azimuth_deg):
            raise ValueError(
                f"references: {len(self.azimuth_deg)} azimuths and {len(self.elevation_deg)} elevations: give one of each "
                "for every picture, or one elevation for all"
            )
        elevations = list(self.elevation_deg) if isinstance(self.elevation_deg, tuple) else self.elevation_deg
        distance = look_at_distance(self.fov_deg, self.fill)
        return Cameras.of(list(self.azimuth_deg), elevations, distance, self.fov_deg)

    def check(self, subjects: Mapping[str, Subject], masks: bool = False) -> Subject:
        """The subject that they are of. ValueError unless there is one, with as many pictures, and with `masks` a mask for
        each."""
        if len(subjects) != 1:
            raise ValueError(f"references are of one subject, and there are {len(subjects)}: give subject.images")
        (subject,) = subjects.values()
        if len(subject.images) != len(self.azimuth_deg):
            raise ValueError(
                f"references.azimuth_deg: {len(self.azimuth_deg)} for {len(subject.images)} pictures; in the order of their "
                f"names they are {', '.join(p.name for p in subject.images)}"
            )
        if masks and (bare := [p.name for p in subject.images if p not in subject.masks]):
            raise ValueError(f"a penalty needs masks of all pictures, and there are none of {', '.join(bare)}")
        self.cameras()
        return subject

    def pictures(self, subjects: Mapping[str, Subject], side: int) -> Pictures:
        """The pictures, side×side pixels, with their cameras. ValueError as `check` has it."""
        subject = self.check(subjects)
        masks = reference_masks(subject, side)
        pixels = (references(subject, side) + 1) / 2
        return Pictures(pixels, self.cameras(), None if masks is None else masks[:, None])
