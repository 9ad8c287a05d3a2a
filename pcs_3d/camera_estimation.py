"""Estimates where pictures of an object were taken from, and crops them to the object.

The camera of a cropped picture looks at the origin from a distance determined by the framing. There are two
estimators. The first compares masked pictures with renders of an asset that resembles the object. The second is the
toybox's pose estimator, which works only for the toybox's own pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.cameras import Cameras, look_at_distance, wrapped_deg
from pcs_3d.renderers.rendering import Rendering

_TOYBOX_FILL = 0.92  # share of a picture's side that an object of radius 1 covers at scale 1 in the toybox
_SOLID = 0.5  # pixels of at least this opacity belong to the silhouette

#: Renders the asset on white from the given cameras. The pixels (`[B, 3, H, W]`, in [0, 1]) are on the CPU.
Renders = Callable[[Cameras], Rendering]


@dataclass(frozen=True)
class Framing:
    """The field of view of the cameras, and the share of a picture's side that an object of radius 1 covers."""

    fov_deg: float
    fill: float

    def cameras(self, azimuth_deg: Tensor, elevation_deg: Tensor, roll_deg: Tensor | float = 0.0) -> Cameras:
        """Returns one camera per azimuth, looking at the origin."""
        distance = look_at_distance(self.fov_deg, self.fill)
        return Cameras.of(azimuth_deg, elevation_deg, distance, self.fov_deg, roll_deg)


@dataclass(frozen=True)
class Estimate:
    """How N pictures are cropped to the object, and the cameras of the cropped pictures.

    centre: the centre of each crop, [N, 2], x right and y down, in [-1, 1] across the picture
    size: the side length of each crop relative to the picture's, [N]
    agreement: how well each cropped picture matches the render from its camera, [N] in [0, 1]; None if not measured
    """

    cameras: Cameras
    centre: Tensor
    size: Tensor
    agreement: Tensor | None = None

    def cut(self, pictures: Tensor, side: int, outside: str = "border") -> Tensor:
        """Crops the pictures (`[N, C, H, W]`) and returns them as `[N, C, side, side]`. Where a crop extends beyond its
        picture, it is filled with the nearest border pixel (`outside` = "border") or with 0 ("zeros")."""
        return _cut(pictures, self.centre, self.size, side, outside)


@dataclass(frozen=True)
class Search:
    """The cameras to try for each picture.

    azimuths: the number of azimuths to try, evenly spaced around the object; each is combined with every elevation
    refinements: how many times the steps between cameras are halved around the best match
    near_deg: the rough azimuth of each picture, if known; before the refinements, only azimuths within `within_deg` of
    it are tried
    """

    azimuths: int = 24
    elevations_deg: tuple[float, ...] = (0.0, 15.0, 30.0, 60.0)
    refinements: int = 2
    near_deg: tuple[float, ...] | None = None
    within_deg: float = 45.0

    def allowed(self, azimuth_deg: Tensor, picture: int) -> Tensor:
        """Returns whether each azimuth (`[B]`) is tried for this picture, as bool `[B]`."""
        if self.near_deg is None:
            return torch.ones_like(azimuth_deg, dtype=torch.bool)
        return wrapped_deg(azimuth_deg - self.near_deg[picture]).abs() <= self.within_deg


def from_renders(
    renders: Renders,
    framing: Framing,
    pictures: Tensor,
    masks: Tensor,
    search: Search = Search(),
) -> Estimate:
    """Estimates cameras by comparing each picture with renders from all around, then with renders at ever smaller steps
    around the best match.

    A picture is moved and scaled so that the bounding box of its silhouette has the same centre and area as the
    render's. The error of a pixel is the mean colour difference if both the picture and the render show the object
    there, and 1 if only one of them does.

    Args:
        pictures: [N, 3, H, H] in [0, 1]
        masks: [N, 1, H, H] in [0, 1]

    Raises:
        ValueError: a mask is empty, or no render shows anything
    """
    boxes = _boxes(masks)
    if bool((empty := boxes[:, 2] == 0).any()):
        raise ValueError(
            f"the mask of picture {int(empty.nonzero()[0, 0]) + 1} is empty, so the picture's camera cannot be found"
        )
    step_azimuth, step_elevation = 360 / search.azimuths, _steps(search.elevations_deg)
    every = torch.arange(search.azimuths) * step_azimuth
    grid = torch.cartesian_prod(every, torch.tensor(search.elevations_deg))
    seen = _Seen(renders(framing.cameras(grid[:, 0], grid[:, 1])))
    best = [
        _best(seen, grid, pictures[i], masks[i], boxes[i], search.allowed(grid[:, 0], i)) for i in range(len(pictures))
    ]
    for _ in range(search.refinements):
        step_azimuth, step_elevation = step_azimuth / 2, step_elevation / 2
        around = torch.cartesian_prod(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0]))
        for i, found in enumerate(best):
            near = found.direction + around * torch.tensor([step_azimuth, step_elevation])
            near[:, 1] = near[:, 1].clamp(-89.0, 89.0)
            seen = _Seen(renders(framing.cameras(near[:, 0], near[:, 1])))
            best[i] = min(found, _best(seen, near, pictures[i], masks[i], boxes[i]), key=lambda b: b.error)
    directions = torch.stack([found.direction for found in best])
    return Estimate(
        framing.cameras(wrapped_deg(directions[:, 0]), directions[:, 1]),
        torch.stack([found.centre for found in best]),
        torch.stack([found.size for found in best]),
        torch.tensor([1 - found.error for found in best]),
    )


def from_toybox_poses(framing: Framing, pictures: Tensor) -> Estimate:
    """Estimates cameras with the toybox's pose estimator. The pictures (`[N, 3, H, H]`, in [0, 1]) must be the toybox's
    own."""
    from shared.toybox.evaluators.pose import load_pose, path_of
    from shared.toybox.motions.motion import PATH

    small = F.interpolate(pictures, (64, 64), mode="bilinear", antialias=True) if pictures.shape[-1] != 64 else pictures
    path = torch.from_numpy(path_of(load_pose().read(small), follow=False)).float()
    x, y, log_scale, azimuth, elevation, roll = (
        path[:, PATH.index(name)] for name in ("x", "y", "log_scale", "azimuth_deg", "elevation_deg", "roll_deg")
    )
    size = log_scale.exp() * _TOYBOX_FILL / framing.fill
    return Estimate(framing.cameras(azimuth, elevation, roll), 2 * torch.stack([x, y], -1), size)


@dataclass(frozen=True)
class _Found:
    direction: Tensor  # [2]: azimuth and elevation
    centre: Tensor
    size: Tensor
    error: float


class _Seen:
    """Renders and the bounding boxes of their silhouettes. Raises ValueError if no render shows anything."""

    def __init__(self, rendering: Rendering) -> None:
        self.opacity = rendering.opacity.clamp(0, 1)
        self.pixels = rendering.pixels
        self.boxes = _boxes(self.opacity)
        if not bool((self.boxes[:, 2] > 0).any()):
            raise ValueError("the asset is empty from every side, so no camera can be found: train it for longer first")


def _best(
    seen: _Seen, directions: Tensor, picture: Tensor, mask: Tensor, box: Tensor, allowed: Tensor | bool = True
) -> _Found:
    """Returns the best match for a picture (`[3, H, H]`) and its mask among B renders. Only renders for which `allowed`
    is true are considered."""
    count, side = len(directions), seen.pixels.shape[-1]
    size = box[2] / seen.boxes[:, 2].clamp_min(1e-3)
    centre = box[:2] - size[:, None] * seen.boxes[:, :2]
    both = torch.cat([picture, mask])[None].expand(count, -1, -1, -1)
    moved = _cut(both, centre, size, side, "zeros")
    pixels, shown = moved[:, :3], moved[:, 3:]
    alone = shown + seen.opacity - 2 * shown * seen.opacity
    apart = (pixels - seen.pixels).abs().mean(1, keepdim=True) * shown * seen.opacity
    union = (shown + seen.opacity - shown * seen.opacity).sum((1, 2, 3)).clamp_min(1e-6)
    error = (alone + apart).sum((1, 2, 3)) / union
    error = torch.where((seen.boxes[:, 2] > 0) & allowed, error, torch.full_like(error, math.inf))
    at = int(error.argmin())
    return _Found(directions[at], centre[at], size[at], float(error[at]))


def _boxes(opacity: Tensor) -> Tensor:
    """Returns the centre (x right, y down) of each silhouette's bounding box and the square root of its area, in units
    of half a picture, as `[B, 3]`. All three are 0 for an empty silhouette. The silhouettes are `[B, 1, H, H]`."""
    side, out = opacity.shape[-1], torch.zeros(len(opacity), 3)
    for i, solid in enumerate(opacity[:, 0] >= _SOLID):
        rows, columns = solid.any(1).nonzero(), solid.any(0).nonzero()
        if len(rows):
            top, bottom, left, right = (float(v) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1))
            out[i, 0], out[i, 1] = (left + right) / side - 1, (top + bottom) / side - 1
            out[i, 2] = math.sqrt((right - left) * (bottom - top)) * 2 / side
    return out


def _cut(pictures: Tensor, centre: Tensor, size: Tensor, side: int, outside: str) -> Tensor:
    theta = torch.zeros(len(pictures), 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = size
    theta[:, :, 2] = centre
    where = F.affine_grid(theta, [len(pictures), 1, side, side], align_corners=False)
    return F.grid_sample(pictures, where, padding_mode=outside, align_corners=False)


def _steps(values: tuple[float, ...]) -> float:
    """Returns the largest step between neighbouring values, or 15 if there is only one value."""
    ordered = sorted(values)
    return max((b - a for a, b in pairwise(ordered)), default=15.0)
