"""Pictures of a thing that come with their cameras: the subject's own, or those that an earlier phase has made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import FOV_DEG, Cameras, look_at_distance
from pcs_3d.regularize.base import Pictures
from pcs_3d.regularize.reference import border_color
from shared.config import KindPart, default_kind, unknown
from shared.io.decode import read_picture
from shared.runner.judging import reference_masks, references
from shared.sources.phase_pictures import read_kept
from shared.types import Subject


class References(KindPart):
    """The cameras of the subject's pictures, in the order of their names. Azimuth 0 shows the front, 90 the thing's left.

    elevation_deg: one for all, or one each; fill: how much of a picture's side a thing of radius 1 takes.
    """

    kind: Literal["subject"] = "subject"
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

    def check(self, subjects: Mapping[str, Subject], masks: bool, earlier: Sequence[str]) -> None:
        """ValueError unless there is one subject with as many pictures, and with `masks` a mask for each."""
        subject = _only(subjects)
        if len(subject.images) != len(self.azimuth_deg):
            raise ValueError(
                f"references.azimuth_deg: {len(self.azimuth_deg)} for {len(subject.images)} pictures; in the order of their "
                f"names they are {', '.join(p.name for p in subject.images)}"
            )
        if masks and (bare := [p.name for p in subject.images if p not in subject.masks]):
            raise ValueError(f"a penalty needs masks of all pictures, and there are none of {', '.join(bare)}")
        self.cameras()

    def pictures(self, subjects: Mapping[str, Subject], side: int, folders: Mapping[str, Path]) -> Pictures:
        """The pictures, side×side pixels, with their cameras. ValueError as `check` has it."""
        self.check(subjects, False, ())
        subject = _only(subjects)
        masks = reference_masks(subject, side)
        pixels = (references(subject, side) + 1) / 2
        return Pictures(pixels, self.cameras(), None if masks is None else masks[:, None])


class PhaseViews(KindPart):
    """The views that the phase called `phase` has made (`task.kind=pseudo_views`), which know their cameras.

    foreground: by how much, of 1, a channel must differ from the colour of a view's border for a pixel to show the thing: a
    mask for prompts that ask for a plain place; None: there are no masks.
    """

    kind: Literal["phase"] = "phase"
    phase: str
    foreground: Annotated[float, Field(gt=0, lt=1)] | None = None

    def check(self, subjects: Mapping[str, Subject], masks: bool, earlier: Sequence[str]) -> None:
        """ValueError where it is none of the `earlier` phases that make views, or `masks` are needed: views have none."""
        if self.phase not in earlier:
            raise ValueError(f"references.phase: {unknown(self.phase, earlier, 'earlier phase that makes views')}")
        if masks:
            raise ValueError(
                f"a penalty needs masks of all pictures, and the views of the phase {self.phase} have none"
            )

    def pictures(self, subjects: Mapping[str, Subject], side: int, folders: Mapping[str, Path]) -> Pictures:
        """The views, side×side pixels, with their cameras. ValueError where they cannot be read."""
        folder = folders[self.phase]
        kept = read_kept(folder)
        pixels = torch.stack([(read_picture(folder / entry["file"], min_side=1).pixels + 1) / 2 for entry in kept])
        if pixels.shape[-1] != side:
            pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=pixels.shape[-1] > side)
        names = ("azimuth_deg", "elevation_deg", "distance", "fov_deg", "roll_deg", "centre")
        cameras = Cameras(*(torch.tensor([entry[name] for entry in kept]) for name in names))
        pixels = pixels.clamp(0, 1)
        return Pictures(pixels, cameras, None if self.foreground is None else _foreground(pixels, self.foreground))


KnownViews = Annotated[References | PhaseViews, Field(discriminator="kind"), default_kind("subject")]


def _only(subjects: Mapping[str, Subject]) -> Subject:
    if len(subjects) != 1:
        raise ValueError(f"references are of one subject, and there are {len(subjects)}: give subject.images")
    (subject,) = subjects.values()
    return subject


def _foreground(pixels: Tensor, least: float) -> Tensor:
    """[B, 1, H, W]: where pictures [B, 3, H, W] differ from the colour of their border; less along the outline."""
    differs = (pixels - border_color(pixels)).abs().amax(1, keepdim=True) > least
    return F.avg_pool2d(differs.float(), 3, 1, 1)
