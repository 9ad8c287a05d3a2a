"""Checks that each view shows the side that its camera looks at. An asset with the Janus problem has a front on several
sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcs_3d.cameras import wrapped_deg
from shared.metrics.encoders import resize01

EDGES_DEG = (45.0, 135.0)
_QUARTERS = (0.0, 90.0, 180.0, 270.0)


@dataclass(frozen=True)
class ReadViews:
    """The directions estimated from B pictures.

    azimuths: the pose estimator's azimuths, [B] in degrees, 0 at the front.
    names: the recognizer's names of the views (front, side, back or above).
    """

    azimuths: Tensor
    names: tuple[str, ...]


def read_views(pixels: Tensor) -> ReadViews:
    """Estimates the view direction of each picture separately, with the toybox's pose estimator and recognizer. The
    pictures are `[B, 3, H, W]` in [-1, 1]."""
    from shared.toybox.evaluators.pose import load_pose, path_of
    from shared.toybox.evaluators.recognizer import load_recognizer
    from shared.toybox.motions.motion import PATH

    small = resize01(pixels, 64)
    path = path_of(load_pose().read(small), follow=False)
    names = tuple(load_recognizer().predict(small)["view"])
    return ReadViews(torch.from_numpy(path[:, PATH.index("azimuth_deg")]).float(), names)


def sectors(azimuth_deg: float) -> set[str]:
    """Returns the sectors that contain an azimuth: front up to 45 degrees, back from 135 degrees, and side in between.
    An azimuth on a border is in both sectors."""
    turn = abs((azimuth_deg + 180) % 360 - 180)
    low, high = EDGES_DEG
    within = {"front": turn <= low, "side": low <= turn <= high, "back": turn >= high}
    return {name for name, yes in within.items() if yes}


def agreeing(named: Sequence[set[str]], azimuths: Sequence[float]) -> list[bool]:
    """Returns, for each view, whether the sectors estimated from the view include a sector that contains its camera."""
    return [bool(seen & sectors(azimuth)) for seen, azimuth in zip(named, azimuths, strict=True)]


def fronts(seen: Sequence[set[str]], azimuths: Sequence[float]) -> int:
    """Returns the number of quarters around an object (front, left, back, right) in which most views look like its
    front. This is 1 for an object with one front and 4 for an object with a front on every side. Views on the border
    between two quarters are left out."""
    count = 0
    for middle in _QUARTERS:
        apart = [abs((a - middle + 180) % 360 - 180) for a in azimuths]
        inside = ["front" in s for s, far in zip(seen, apart, strict=True) if far < EDGES_DEG[0]]
        count += 2 * sum(inside) > len(inside)
    return count


def turned_by(read: Tensor, azimuths: Tensor) -> Tensor:
    """Returns the angles between the estimated azimuths and those of the cameras, `[B]`, in degrees from 0 to 180."""
    return wrapped_deg(read - azimuths).abs()
