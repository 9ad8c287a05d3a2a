"""Pictures with known cameras, which are the subject's own pictures or were written by an earlier phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import FOV_DEG, Cameras, look_at_distance
from pcs_3d.regularize.base import Pictures
from pcs_3d.regularize.reference import border_color
from shared.config import KindPart, Real, default_kind, unknown
from shared.io.decode import read_picture
from shared.runner.judging import reference_masks, references
from shared.sources.phase_pictures import read_kept
from shared.types import Subject


class References(KindPart):
    """The cameras of the subject's pictures, in the order of the pictures' file names. At azimuth 0, a picture shows
    the object's front, and at azimuth 90, its left side.

    elevation_deg: one elevation for all pictures, or one per picture.
    fill: the share of a picture's side length that an object of radius 1 covers.
    """

    kind: Literal["subject"] = "subject"
    azimuth_deg: Annotated[tuple[Real, ...], Field(min_length=1)]  # one per picture
    elevation_deg: Real | tuple[Real, ...] = 15.0
    fov_deg: Annotated[float, Field(gt=0, lt=180)] = FOV_DEG  # vertical field of view of the pictures
    fill: Annotated[float, Field(gt=0, le=2)] = 0.92

    def cameras(self) -> Cameras:
        """Returns one camera per picture. Raises ValueError if several elevations are given, but not one per
        azimuth."""
        if isinstance(self.elevation_deg, tuple) and len(self.elevation_deg) != len(self.azimuth_deg):
            raise ValueError(
                f"references: the numbers of azimuths ({len(self.azimuth_deg)}) and elevations "
                f"({len(self.elevation_deg)}) differ: give one of each per picture, or one elevation for all"
            )
        elevations = list(self.elevation_deg) if isinstance(self.elevation_deg, tuple) else self.elevation_deg
        distance = look_at_distance(self.fov_deg, self.fill)
        return Cameras.of(list(self.azimuth_deg), elevations, distance, self.fov_deg)

    def check(self, subjects: Mapping[str, Subject], masks: bool, earlier: Mapping[str, bool]) -> None:
        """Raises ValueError unless there is one subject, with one picture per azimuth and, if `masks` is set, a mask
        for each picture."""
        subject = only(subjects)
        if len(subject.images) != len(self.azimuth_deg):
            raise ValueError(
                f"references.azimuth_deg must have one azimuth per picture ({len(subject.images)}), but has "
                f"{len(self.azimuth_deg)}; give them in this order: {', '.join(p.name for p in subject.images)}"
            )
        if masks and (bare := [p.name for p in subject.images if p not in subject.masks]):
            raise ValueError(f"a penalty needs masks for all pictures, but these have none: {', '.join(bare)}")
        self.cameras()

    def pictures(self, subjects: Mapping[str, Subject], side: int, folders: Mapping[str, Path]) -> Pictures:
        """Reads the pictures at side×side pixels, with their cameras. Raises ValueError in the same cases as
        `check`."""
        self.check(subjects, False, {})
        subject = only(subjects)
        masks = reference_masks(subject, side)
        pixels = (references(subject, side) + 1) / 2
        return Pictures(pixels, self.cameras(), None if masks is None else masks[:, None])


class PhaseViews(KindPart):
    """The pictures written by one or more earlier phases, with their cameras.

    phase: the name of the phase, or several names. For a phase with `task.kind=pseudo_views`, the pictures are the
    views that it generated. For a phase with `task.kind=reference_cameras`, they are the subject's own pictures, with
    the cameras that the phase found. The pictures of a phase that is named twice are used twice.
    foreground: the threshold, strictly between 0 and 1, used to make masks for views without masks. A pixel belongs to
    the object if one of its channels differs from the colour of the view's border by more than this value. This
    requires views with a plain background. If null, no masks are made.
    """

    kind: Literal["phase"] = "phase"
    phase: str | Annotated[tuple[str, ...], Field(min_length=1)]
    foreground: Annotated[float, Field(gt=0, lt=1)] | None = None

    def check(self, subjects: Mapping[str, Subject], masks: bool, earlier: Mapping[str, bool]) -> None:
        """Raises ValueError if a phase is not among the `earlier` phases that write views, or if masks are needed but
        missing."""
        for name in self.phases:
            if name not in earlier:
                raise ValueError(f"references.phase: {unknown(name, earlier, 'earlier phase that writes views')}")
        bare = [name for name in self.phases if not earlier[name]]
        if bare and self.foreground is None and (masks or len(bare) < len(self.phases)):
            why = (
                "a penalty needs masks for all pictures"
                if masks
                else "pictures must either all have masks or all lack them"
            )
            raise ValueError(
                f"{why}, but the views of the phase {bare[0]} have none: set references.foreground=0.25 to make masks "
                "for views with plain backgrounds"
            )

    @property
    def phases(self) -> tuple[str, ...]:
        """The names of the phases."""
        return (self.phase,) if isinstance(self.phase, str) else self.phase

    def pictures(self, subjects: Mapping[str, Subject], side: int, folders: Mapping[str, Path]) -> Pictures:
        """Reads the views at side×side pixels, with their cameras. Raises ValueError if they cannot be read."""
        each = [self._of(folders[name], side) for name in self.phases]
        masks = [views.masks for views in each if views.masks is not None]
        return Pictures(
            torch.cat([views.pixels for views in each]),
            Cameras.cat([views.cameras for views in each]),
            torch.cat(masks) if len(masks) == len(each) else None,
        )

    def _of(self, folder: Path, side: int) -> Pictures:
        kept = read_kept(folder)
        pixels = _stacked([folder / entry["file"] for entry in kept], side)
        cameras = Cameras(*(torch.tensor([entry[name] for entry in kept]) for name in vars(_ANY)))
        masks = None
        if all("mask" in entry for entry in kept):
            masks = _stacked([folder / entry["mask"] for entry in kept], side)[:, :1]
        elif self.foreground is not None:
            masks = _foreground(pixels, self.foreground)
        return Pictures(pixels, cameras, masks)


_ANY = Cameras.of([0.0])
KnownViews = Annotated[References | PhaseViews, Field(discriminator="kind"), default_kind("subject")]


def only(subjects: Mapping[str, Subject]) -> Subject:
    """Returns the only subject. Raises ValueError if there are several subjects or none."""
    if len(subjects) != 1:
        raise ValueError(f"references need exactly one subject, but there are {len(subjects)}: give subject.images")
    (subject,) = subjects.values()
    return subject


def camera_entry(cameras: Cameras, i: int) -> dict[str, Any]:
    """Returns camera `i` in the form in which a phase's list of pictures stores it."""
    return {name: value.tolist()[0] for name, value in vars(cameras[i : i + 1]).items()}


def _stacked(files: Sequence[Path], side: int) -> Tensor:
    """Reads pictures as [N, 3, side, side] in [0, 1]."""
    pixels = torch.stack([(read_picture(file, min_side=1).pixels + 1) / 2 for file in files])
    if pixels.shape[-1] != side:
        pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=pixels.shape[-1] > side)
    return pixels.clamp(0, 1)


def _foreground(pixels: Tensor, least: float) -> Tensor:
    """Returns masks (`[B, 1, H, W]`) of the pixels at which pictures (`[B, 3, H, W]`) differ from their border colour.
    The masks are soft along the silhouette."""
    differs = (pixels - border_color(pixels)).abs().amax(1, keepdim=True) > least
    return F.avg_pool2d(differs.float(), 3, 1, 1)
