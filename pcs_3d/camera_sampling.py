"""Draws the cameras of the views in a step."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator, model_validator
from torch import Generator, Tensor

from pcs_3d.cameras import Cameras, wrapped_deg
from pcs_3d.schedules import Moment, Schedule
from shared.config import BatchSize, NotNegative, Part, Real


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"{list(value)}: the first number must not be greater than the second")
    return value


Range = Annotated[tuple[Real, Real], AfterValidator(_ordered)]


class CameraSampling(Part):
    """Random cameras around an object of radius 1, drawn as in DreamFusion and threestudio.

    On average, half of the elevations are uniform in angle, and the other half are uniform on the sphere. Azimuths are
    stratified over the batch. `grown` scales all ranges, from 0 (only the front view) to 1 (the full ranges). With
    `ring` = n, the cameras of each group of n views differ only in their azimuths, which are evenly spaced around the
    object (MVDream, https://arxiv.org/abs/2308.16512). In that case, azimuths are stratified over the groups, not over
    individual views.
    """

    azimuth_deg: Range = (-180.0, 180.0)  # 0 is the front
    elevation_deg: Range = (-10.0, 60.0)  # 0 is level, 90 is from above
    fov_deg: Range = (24.53, 24.53)  # vertical field of view
    fill: Range = (0.75, 0.95)  # share of the view's side that an object of radius 1 covers; determines the distance
    distance: Range | None = None  # in radii; overrides `fill`
    roll_deg: NotNegative = 0.0  # standard deviation of the roll
    look_at: NotNegative = 0.0  # standard deviation, in radii, of the point that the camera looks at
    jitter: NotNegative = 0.0  # the camera's position is shifted along each axis by up to ± this many radii
    grown: Schedule = 1.0
    ring: BatchSize = 1

    @model_validator(mode="after")
    def _sees(self) -> CameraSampling:
        if not 0 < self.fov_deg[0] <= self.fov_deg[1] < 180:
            raise ValueError(f"fov_deg = {list(self.fov_deg)} must be between 0 and 180")
        if not -90 <= self.elevation_deg[0] <= self.elevation_deg[1] <= 90:
            raise ValueError(f"elevation_deg = {list(self.elevation_deg)} must be between -90 and 90")
        if self.fill[0] <= 0 or (self.distance is not None and self.distance[0] <= 0):
            raise ValueError("fill and distance must be above 0")
        return self

    def sample(self, count: int, moment: Moment, generator: Generator) -> Cameras:
        """Draws `count` cameras. Raises ValueError unless `count` is a multiple of `ring`."""
        if count % self.ring:
            raise ValueError(f"train.batch_size = {count} must be a multiple of cameras.ring = {self.ring}")
        groups, size = count // self.ring, moment.of(self.grown)

        def spread(low: float, high: float, middle: float) -> Tensor:
            low, high = (middle + size * (end - middle) for end in (low, high))
            return low + (high - low) * torch.rand(groups, generator=generator)

        azimuth = self._azimuths(groups, size, generator)
        elevation = self._elevations(groups, size, generator)
        fov = spread(*self.fov_deg, sum(self.fov_deg) / 2)
        if self.distance is None:
            fill = spread(*self.fill, sum(self.fill) / 2)
            distance = 1 / (fill * torch.tan(torch.deg2rad(fov) / 2))
        else:
            distance = spread(*self.distance, sum(self.distance) / 2)
        roll = self.roll_deg * torch.randn(groups, generator=generator)
        centre = self.look_at * torch.randn(groups, 3, generator=generator)
        shift = self.jitter * (2 * torch.rand(groups, 3, generator=generator) - 1)
        made = moved(Cameras(azimuth, elevation, distance, fov, roll, centre), shift)
        rings = Cameras(*(value.repeat_interleave(self.ring, 0) for value in vars(made).values()))
        turn = (360 / self.ring) * torch.arange(self.ring).repeat(groups)
        cameras = Cameras(wrapped_deg(rings.azimuth_deg + turn), *list(vars(rings).values())[1:])
        cameras.check()
        return cameras

    def _azimuths(self, count: int, size: float, generator: Generator) -> Tensor:
        """Draws one azimuth in each of `count` equal parts of the range, scaled by `size`."""
        low, high = (size * end for end in self.azimuth_deg)
        places = (torch.arange(count) + torch.rand(count, generator=generator)) / count
        return low + (high - low) * places

    def _elevations(self, count: int, size: float, generator: Generator) -> Tensor:
        middle = min(max(15.0, self.elevation_deg[0]), self.elevation_deg[1])
        low, high = (middle + size * (end - middle) for end in self.elevation_deg)
        u, coin = torch.rand(count, generator=generator), torch.rand(count, generator=generator)
        ends = torch.deg2rad(torch.tensor([low, high])).sin()
        on_sphere = torch.rad2deg(torch.asin((ends[0] + (ends[1] - ends[0]) * u).clamp(-1, 1)))
        return torch.where(coin < 0.5, low + (high - low) * u, on_sphere)


def moved(cameras: Cameras, shift: Tensor) -> Cameras:
    """Returns the cameras moved by `shift` (`[B, 3]`), still looking at the same points."""
    offset = cameras.distance[:, None] * cameras.axes[:, 2] + shift
    distance = offset.norm(dim=-1).clamp_min(1e-3)
    elevation = torch.rad2deg(torch.asin((offset[:, 2] / distance).clamp(-1, 1)))
    azimuth = torch.rad2deg(torch.atan2(offset[:, 1], offset[:, 0]))
    still = (shift == 0).all(-1)
    return Cameras(
        torch.where(still, cameras.azimuth_deg, azimuth),
        torch.where(still, cameras.elevation_deg, elevation),
        torch.where(still, cameras.distance, distance),
        cameras.fov_deg,
        cameras.roll_deg,
        cameras.centre,
    )
