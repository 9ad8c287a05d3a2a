"""Pictures with known cameras: the subject's own, or views made by an earlier phase."""

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
    """The cameras of the subject's pictures, in the order of their file names. Azimuth 0 shows the front, 90 the thing's left.

    elevation_deg: one for all, or one each; fill: how much of a picture's side a thing of radius 1 covers.
    """

    kind: Literal["subject"] = "subject"
    azimuth_deg: Annotated[tuple[float, ...], Field(min_length=1)]
    elevation_deg: float | tuple[float, ...] = 15.0
    fov_deg: Annotated[float, Field(gt=0, lt=180)] = FOV_DEG
    fill: Annotated[float, Field(gt=0, le=2)] = 0.92

    def cameras(self) -> Cameras:
        """One for each picture. Raises ValueError unless there are as many elevations as azimuths."""
        if isinstance(self.elevation_deg, tuple) and len(self.elevation_deg) != len(self.azimuth_deg):
            raise ValueError(
                f"references: {len(self.azimuth_deg)} azimuths but {len(self.elevation_deg)} elevations: give one of each "
                "for every picture, or one elevation for all"
            )
        elevations = list(self.elevation_deg) if isinstance(self.elevation_deg, tuple) else self.elevation_deg
        distance = look_at_distance(self.fov_deg, self.fill)
        return Cameras.of(list(self.azimuth_deg), elevations, distance, self.fov_deg)

    def check(self, subjects: Mapping[str, Subject], masks: bool, earlier: Sequence[str]) -> None:
        """Raises ValueError unless there is one subject with as many pictures, and if `masks`, a mask for each."""
        subject = _only(subjects)
        if len(subject.images) != len(self.azimuth_deg):
            raise ValueError(
                f"references.azimuth_deg: {len(self.azimuth_deg)} azimuths for {len(subject.images)} pictures; give one for "
                f"each, in this order: {', '.join(p.name for p in subject.images)}"
            )
        if masks and (bare := [p.name for p in subject.images if p not in subject.masks]):
            raise ValueError(f"a penalty needs masks for all pictures, and these have none: {', '.join(bare)}")
        self.cameras()

    def pictures(self, subjects: Mapping[str, Subject], side: int, folders: Mapping[str, Path]) -> Pictures:
        """The pictures, side×side pixels, with their cameras. Raises ValueError as `check` does."""
        self.check(subjects, False, ())
        subject = _only(subjects)
        masks = reference_masks(subject, side)
        pixels = (references(subject, side) + 1) / 2
        return Pictures(pixels, self.cameras(), None if masks is None else masks[:, None])


class PhaseViews(KindPart):
    """The views made by the phase called `phase` (`task.kind=pseudo_views`), with their cameras.

    foreground: a pixel shows the thing if a channel differs from the colour of the view's border by more than this, in [0, 1];
    a mask for prompts with a plain background. None: no masks.
    """

    kind: Literal["phase"] = "phase"
    phase: str
    foreground: Annotated[float, Field(gt=0, lt=1)] | None = None

    def check(self, subjects: Mapping[str, Subject], masks: bool, earlier: Sequence[str]) -> None:
        """Raises ValueError if it is not among the `earlier` phases that make views, or if `masks` are needed."""
        if self.phase not in earlier:
            raise ValueError(f"references.phase: {unknown(self.phase, earlier, 'earlier phase that makes views')}")
        if masks:
            raise ValueError(
                f"a penalty needs masks for all pictures, and the views of the phase {self.phase} have none"
            )

    def pictures(self, subjects: Mapping[str, Subject], side: int, folders: Mapping[str, Path]) -> Pictures:
        """The views, side×side pixels, with their cameras. Raises ValueError if they cannot be read."""
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
        raise ValueError(f"references need exactly one subject, and there are {len(subjects)}: give subject.images")
    (subject,) = subjects.values()
    return subject


def _foreground(pixels: Tensor, least: float) -> Tensor:
    """[B, 1, H, W]: where pictures [B, 3, H, W] differ from the colour of their border; soft along the silhouette."""
    differs = (pixels - border_color(pixels)).abs().amax(1, keepdim=True) > least
    return F.avg_pool2d(differs.float(), 3, 1, 1)
