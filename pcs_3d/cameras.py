"""Cameras that look at an object. Angles are in degrees, and lengths are in object radii."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

DISTANCE, FOV_DEG = 5.0, 24.53
"""The distance and field of view of the toybox's cameras. With them, an object of radius 1 spans 92% of the picture's
width."""


@dataclass(frozen=True)
class Cameras:
    """B pinhole cameras around the origin; fields are float32 [B] unless stated otherwise.

    In world coordinates, x points to the object's front, y to its left and z up. A camera at azimuth 0 looks at the
    object's front, one at azimuth 90 looks at its left side, and one at elevation 90 looks at it from above. `roll_deg`
    turns the picture clockwise. `fov_deg` is the angle across the picture's shorter side. `centre` (`[B, 3]`) is the
    point in the middle of the picture, and `distance` is the camera's distance from it.
    """

    azimuth_deg: Tensor
    elevation_deg: Tensor
    distance: Tensor
    fov_deg: Tensor
    roll_deg: Tensor
    centre: Tensor

    @staticmethod
    def of(
        azimuth_deg: Tensor | list[float],
        elevation_deg: Tensor | list[float] | float = 15.0,
        distance: Tensor | float = DISTANCE,
        fov_deg: Tensor | float = FOV_DEG,
        roll_deg: Tensor | float = 0.0,
        centre: Tensor | None = None,
    ) -> Cameras:
        """Returns one camera per azimuth. For the other arguments, a single number applies to all cameras. Raises
        ValueError as `check` does."""
        azimuth = torch.as_tensor(azimuth_deg, dtype=torch.float32).reshape(-1)

        def each(value: Tensor | list[float] | float) -> Tensor:
            return torch.as_tensor(value, dtype=torch.float32).expand(len(azimuth)).contiguous()

        middle = torch.zeros(3) if centre is None else centre.float()
        made = Cameras(
            azimuth, each(elevation_deg), each(distance), each(fov_deg), each(roll_deg), middle.expand(len(azimuth), 3)
        )
        made.check()
        return made

    def check(self) -> None:
        """Raises ValueError for values that are not finite, a distance of 0 or less, or a field of view outside (0,
        180)."""
        if not all(bool(value.isfinite().all()) for value in vars(self).values()):
            raise ValueError("cameras: an angle or a length is not a finite number")
        if bool((self.distance <= 0).any()):
            raise ValueError(f"cameras: distances must be above 0, but the smallest is {float(self.distance.min()):g}")
        if bool(((self.fov_deg <= 0) | (self.fov_deg >= 180)).any()):
            raise ValueError("cameras: fields of view must be between 0 and 180 degrees")

    def __len__(self) -> int:
        return len(self.azimuth_deg)

    def __getitem__(self, index: slice | Tensor) -> Cameras:
        return Cameras(*(value[index] for value in vars(self).values()))

    def to(self, device: torch.device | str) -> Cameras:
        """Returns the cameras, moved to a device."""
        return Cameras(*(value.to(device) for value in vars(self).values()))

    @staticmethod
    def cat(several: list[Cameras]) -> Cameras:
        """Concatenates cameras, in order."""
        return Cameras(*(torch.cat(values) for values in zip(*(vars(c).values() for c in several), strict=True)))

    @property
    def axes(self) -> Tensor:
        """Each camera's axes as the rows of `[B, 3, 3]`: the picture's right and up directions, and the direction from
        the object to the camera."""
        azimuth, elevation, roll = (torch.deg2rad(a) for a in (self.azimuth_deg, self.elevation_deg, self.roll_deg))
        zero = torch.zeros_like(azimuth)
        right = torch.stack([-azimuth.sin(), azimuth.cos(), zero], -1)
        toward = torch.stack([elevation.cos() * azimuth.cos(), elevation.cos() * azimuth.sin(), elevation.sin()], -1)
        up = torch.cross(toward, right, dim=-1)  # without dim, a batch of three would be crossed along the wrong axis
        cos, sin = roll.cos()[:, None], roll.sin()[:, None]
        return torch.stack([right * cos + up * sin, up * cos - right * sin, toward], 1)

    @property
    def positions(self) -> Tensor:
        """The positions of the cameras, `[B, 3]`."""
        return self.centre + self.distance[:, None] * self.axes[:, 2]

    @property
    def focal(self) -> Tensor:
        """The focal lengths, `[B]`, for a picture that spans -1 to 1."""
        return 1 / torch.tan(torch.deg2rad(self.fov_deg) / 2)

    def rays(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Returns the origins and unit directions of the rays through pixel centres, both `[B, H, W, 3]`. The field of
        view spans the shorter side."""
        device, shorter = self.distance.device, min(height, width)
        rows = (torch.arange(height, device=device) + 0.5 - height / 2) * (-2 / shorter)
        columns = (torch.arange(width, device=device) + 0.5 - width / 2) * (2 / shorter)
        up, right = torch.meshgrid(rows, columns, indexing="ij")
        focal = self.focal[:, None, None]
        local = torch.stack([right / focal, up / focal, torch.full_like(right / focal, -1.0)], -1)
        directions = torch.einsum("bhwi,bij->bhwj", local, self.axes)
        origins = self.positions[:, None, None].expand_as(directions)
        return origins, F.normalize(directions, dim=-1)

    def project(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Projects points (`[N, 3]` or `[B, N, 3]`) onto the pictures.

        Returns:
            Positions in each picture (`[B, N, 2]`; x right, y up, -1 to 1 along the shorter side), and depths along the
            camera's axis (`[B, N]`). Points behind a camera have a depth of 0 or less.
        """
        moved = points - self.positions[:, None]
        local = torch.einsum("bnj,bij->bni", moved, self.axes)
        depth = -local[..., 2]
        safe = torch.where(depth.abs() < 1e-6, torch.full_like(depth, 1e-6), depth)
        return local[..., :2] * self.focal[:, None, None] / safe[..., None], depth

    def turned(self, by_deg: float) -> Cameras:
        """Returns the cameras, rotated around the object by `by_deg` degrees."""
        return replace(self, azimuth_deg=self.azimuth_deg + by_deg)


def turntable(count: int, elevation_deg: float = 15.0) -> Cameras:
    """Places `count` cameras evenly around the object, starting at its front."""
    return Cameras.of([360 * i / count for i in range(count)], elevation_deg)


def wrapped_deg(angle: Tensor) -> Tensor:
    """Wraps angles to [-180, 180)."""
    return (angle + 180) % 360 - 180


def look_at_distance(fov_deg: float, fill: float = 0.92) -> float:
    """Returns the distance at which an object of radius 1 spans the share `fill` of the picture's shorter side."""
    return 1 / (fill * math.tan(math.radians(fov_deg) / 2))
