"""The pose estimator, which determines the position, size and orientation of the thing in a toybox picture.

It is a convolutional network that processes each picture separately. A clip's path is estimated frame by frame. Only
the azimuth is tracked over time, because it can be off by half a turn in a single picture. `weights/CARD.md` states the
estimator's accuracy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from shared.toybox.evaluators.convnet import WEIGHTS, Trunk, TrunkConfig, check_pixels, load_state, read_config
from shared.toybox.motions.motion import PATH, Array
from shared.toybox.motions.path_distance import UNITS

_AZIMUTH = PATH.index("azimuth_deg")
LINEAR = tuple(name for name in PATH if name != "azimuth_deg")
"""The columns of a path that the network predicts as plain numbers, in the order of its outputs."""
_PLACES = 32  # the number of channels that keep their spatial layout
_STEP_DEG = 45.0  # the most that a thing usually turns from one frame to the next


class PoseConfig(BaseModel):
    """The settings of the trunk, and the number of bins into which the azimuth is divided."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    trunk: TrunkConfig = TrunkConfig()
    bins: int = 36


@dataclass(frozen=True)
class Poses:
    """The poses read from B pictures.

    linear: `[B, 5]`, the `LINEAR` columns. Positions are fractions of the picture, the scale is a natural logarithm,
        and angles are in degrees.
    azimuths: `[B, bins]`, the probability of each azimuth bin. The first bin is centred on 0 (front).
    """

    linear: Tensor
    azimuths: Tensor


class PoseEstimator(nn.Module):
    """A network that estimates the pose of the one thing in each picture (`[B, 3, 64, 64]` in [0, 1])."""

    def __init__(self, config: PoseConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.trunk)
        hidden = 256
        self.places = nn.Conv2d(config.trunk.widths[self.trunk.looks], _PLACES, 1)
        side = 64 // 2 ** (self.trunk.looks + 1)
        features = self.trunk.features + _PLACES * side**2
        self.neck = nn.Sequential(nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.linear = nn.Linear(hidden, len(LINEAR))
        self.azimuth = nn.Linear(hidden, config.bins)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the `LINEAR` columns in the units `path_distance.UNITS`, `[B, 5]`, and the logits of the azimuth
        bins, `[B, bins]`."""
        maps = self.trunk.maps(pixels)
        pooled, _ = self.trunk.pooled(maps)
        places = torch.relu(self.places(maps[self.trunk.looks])).float().flatten(1)
        hidden = self.neck(torch.cat([pooled, places], 1))
        return self.linear(hidden), self.azimuth(hidden)

    @torch.no_grad()
    def read(self, pixels: Tensor, batch_size: int = 128) -> Poses:
        """Reads the poses from pictures (`[B, 3, 64, 64]` in [0, 1]). The result is on the CPU."""
        check_pixels(pixels)
        device = next(self.parameters()).device
        parts = [self(chunk.to(device, torch.float32)) for chunk in pixels.split(batch_size)]
        linear, logits = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        return Poses(linear * units(), logits.softmax(1))

    def path(self, frames: Tensor) -> Array:
        """Reads the path from a clip (`[3, F, 64, 64]` in [-1, 1]). Returns float64 `[F, 6]` with columns
        `motion.PATH`."""
        return path_of(self.read((frames.transpose(0, 1) / 2 + 0.5).clamp(0, 1)))


def units() -> Tensor:
    """Returns the units of the `LINEAR` columns, `[5]`."""
    return torch.tensor([UNITS[name] for name in LINEAR])


def path_of(poses: Poses, follow: bool = True) -> Array:
    """Converts the poses in the F frames of a clip to the clip's path, float64 `[F, 6]`.

    follow: whether the azimuth is tracked over time and may exceed 180 degrees. If False, each frame's azimuth is
        determined separately.
    """
    path = np.zeros((len(poses.linear), len(PATH)))
    path[:, [PATH.index(name) for name in LINEAR]] = poses.linear.double().numpy()
    at = torch.from_numpy(followed(poses.azimuths.double().numpy())) if follow else poses.azimuths.argmax(1)
    turned = _around(poses.azimuths, at).double().numpy()
    path[:, _AZIMUTH] = np.degrees(np.unwrap(np.radians(turned))) if follow else turned
    return path


def followed(chances: Array, step_deg: float = _STEP_DEG) -> np.ndarray:
    """Returns the most probable sequence of azimuth bins, int64 `[F]`. `chances` (`[F, bins]`) contains the probability
    of each bin in each frame.

    The sequence is found with the Viterbi algorithm. Turns from frame to frame are assumed to follow a wrapped normal
    distribution with standard deviation `step_deg` / 2.
    """
    bins = chances.shape[1]
    apart = np.abs((np.arange(bins) + bins // 2) % bins - bins // 2) * 360 / bins
    far = -0.5 * (apart / (step_deg / 2)) ** 2
    cost = far[(np.arange(bins)[:, None] - np.arange(bins)[None]) % bins]  # [from, to]
    score, back = np.log(chances[0] + 1e-9), []
    for seen in chances[1:]:
        ways = score[:, None] + cost
        back.append(ways.argmax(0))
        score = ways.max(0) + np.log(seen + 1e-9)
    way = [int(score.argmax())]
    for before in reversed(back):
        way.append(int(before[way[-1]]))
    return np.array(way[::-1])


def _around(chances: Tensor, at: Tensor) -> Tensor:
    """Averages the directions of the bin `at` (`[B]`) and of its two nearest neighbours on each side, weighted by the
    probabilities `chances` (`[B, bins]`). Returns degrees, `[B]`."""
    bins = chances.shape[1]
    near = (at[:, None] + torch.arange(-2, 3)) % bins
    weight = chances.gather(1, near) + 1e-9
    angle = near * (2 * torch.pi / bins)
    return torch.rad2deg(torch.atan2((weight * angle.sin()).sum(1), (weight * angle.cos()).sum(1)))


@lru_cache(maxsize=4)
def load_pose(folder: Path | str = WEIGHTS / "pose") -> PoseEstimator:
    """Loads the pose estimator from `folder`, frozen and on the CPU. Each folder is loaded once per process."""
    path, raw = read_config(folder, "pose")
    return load_state(PoseEstimator(PoseConfig.model_validate(raw)), path)
