"""Defines the task that trains the pose estimator, and determines the true poses of things in pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from shared.pretrain.evaluators.augment import augment
from shared.pretrain.evaluators.data import Pictures
from shared.pretrain.evaluators.tasks import EvaluatorTask, EvaluatorTraining, flags_of
from shared.pretrain.task import Compute
from shared.pretrain.toybox.dataset import scene_of
from shared.toybox.evaluators.convnet import adopt_state, save_model
from shared.toybox.evaluators.pose import LINEAR, PoseConfig, PoseEstimator, units
from shared.toybox.evaluators.recognizer import Recognizer
from shared.toybox.motions.motion import PATH
from shared.toybox.world import Camera

_SOFT_DEG = 8.0  # standard deviation of the azimuths' target distributions
_STEEP_DEG = 70.0  # above this elevation, azimuth and roll can hardly be distinguished
_SMALL = 0.3  # errors below this, in multiples of `units()`, are penalised quadratically


def poses_of(folder: Path, count: int) -> np.ndarray:
    """Returns the poses of the things in a data set's first `count` pictures, float32 `[count, 6]`. `motion.PATH` names
    the columns. Rows for pictures of two things are NaN.

    The scenes are sampled again from the data set's seed, without being rendered.
    """
    seed = json.loads((folder / "recipe.json").read_text("utf-8"))["seed"]
    poses = np.full((count, len(PATH)), np.nan, np.float32)
    for index in range(count):
        scene, _ = scene_of(seed, index)
        if len(scene.things) == 1:
            poses[index] = pose_of(scene.cameras[0])
    return poses


def pose_of(camera: Camera) -> np.ndarray:
    """Converts a camera to one row of a path, float64 `[6]`."""
    return np.array(
        [camera.x, camera.y, np.log(camera.scale), camera.azimuth_deg, camera.elevation_deg, camera.roll_deg]
    )


class PoseTask(EvaluatorTask):
    """Minimises the smooth L1 errors in position, size, elevation and roll, and the cross-entropy of the azimuth.

    Args:
        poses: float32 `[N, 6]`, as returned by `poses_of`
        start: a recognizer, whose trunk initialises the estimator's trunk
    """

    def __init__(
        self,
        data: Pictures,
        poses: np.ndarray,
        settings: EvaluatorTraining,
        compute: Compute,
        config: PoseConfig | None = None,
        start: Recognizer | None = None,
    ) -> None:
        torch.manual_seed(settings.seed)
        self.data, self.poses, self.flags = data, torch.from_numpy(poses), flags_of(data)
        self.config = config or PoseConfig()
        self.estimator = PoseEstimator(self.config)
        if start is not None:
            self.estimator.trunk.load_state_dict(start.trunk.state_dict())
        self._set_up(self.estimator, settings, compute)

    def terms(self, draws: Generator) -> dict[str, Tensor]:
        """Returns one term for all columns except the azimuth, and one for the azimuth."""
        device = self.compute.device
        rows, pixels = self.data.draw(draws, self.batch_size)
        pixels = augment(pixels, draws, shift=0).to(device)  # a shift would change the pose
        with self.compute.autocast():
            linear, azimuth = self.estimator(pixels)
        poses = self.poses[rows].to(device)
        known = ~poses[:, 0].isnan()
        if not bool(known.any()):
            return {"linear": linear.sum() * 0, "azimuth": azimuth.sum() * 0}
        truth, read = poses[known], linear[known].float()
        asked = truth[:, [PATH.index(name) for name in LINEAR]] / units().to(device)
        errors = F.smooth_l1_loss(read, asked, reduction="none", beta=_SMALL)
        level = (truth[:, PATH.index("elevation_deg")] < _STEEP_DEG).float()
        errors = errors * torch.where(
            torch.tensor([name == "roll_deg" for name in LINEAR], device=device), level[:, None], 1
        )
        target = soft_azimuths(truth[:, PATH.index("azimuth_deg")], self.config.bins)
        return {"linear": errors.sum(1).mean(), "azimuth": F.cross_entropy(azimuth[known].float(), target)}

    def export(self, out: Path) -> None:
        """Writes the estimator."""
        save_model(self.module, self.config, out)

    def adopt(self, out: Path) -> bool:
        """Loads an estimator written by `export`."""
        return adopt_state(self.module, out)


def soft_azimuths(azimuth_deg: Tensor, bins: int) -> Tensor:
    """Converts azimuths `[B]` to probabilities `[B, bins]`, with a wrapped normal distribution around each azimuth."""
    centres = torch.arange(bins, device=azimuth_deg.device) * (360 / bins)
    apart = (centres - azimuth_deg[:, None] + 180) % 360 - 180
    return (-0.5 * (apart / _SOFT_DEG) ** 2).softmax(1)
