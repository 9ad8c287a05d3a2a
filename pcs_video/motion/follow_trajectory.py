"""Makes clips follow a path, by shifting latents from frame to frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.io.trajectory_settings import Trajectory
from shared.sampling.box_tracks import latent_frame_times
from shared.sampling.hooks import DenoisingStep, SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.settings import SamplingSettings

_MARGIN = 0.2  # of the frame: about half the size of a subject
_STREAM = 2**41  # random stream for filling what comes into view, separate from the noise and from the camera's


class FollowTrajectory(SamplingHookBase):
    """Moves what is being generated along a trajectory, without training.

    Once the layout has begun to form, each frame's latents are shifted (and scaled) to where the trajectory is in that frame.
    The remaining steps, in which the model sees all frames, redraw the background and make the subject whole. MotionBooth
    shifts latents in this way for cameras (https://arxiv.org/abs/2406.17758), and FreeTraj moves noise along trajectories
    (https://arxiv.org/abs/2406.16863). Latents are shifted by whole cells; what comes into view is filled with values from the
    same row near the left and right edges. If the path would take the subject out of view from where it is, all of it is moved.

    `VideoRunner.generate` leaves it out for prompts that do not name the concept.
    """

    kind: Literal["follow_trajectory"] = "follow_trajectory"
    name: str  # the concept's
    trajectory: Trajectory

    def resting(self) -> FollowTrajectory:
        """Returns a hook of the same concept that moves nothing."""
        return self.model_copy(update={"trajectory": Trajectory()})

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SamplingHookBase:
        """Returns the hook that moves the latents; for pictures, one that does nothing."""
        *frames, _, _ = output_size(backbone, settings)
        return Following(trajectory=self.trajectory) if frames and self.trajectory.points else SamplingHookBase()


class Following(SamplingHookBase):
    """Follows a trajectory in one call of the sampler; see `FollowTrajectory`."""

    trajectory: Trajectory
    _before: list[tuple[Tensor, float]] = PrivateAttr(default_factory=list)  # the last step's latents and noise level

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        now = min(math.ceil(self.trajectory.start * step.steps), step.steps - 1)
        if step.index == now - 1:
            self._before[:] = [(latents, _noise_level(step))]
        if step.index != now:
            return latents
        frames, height, width = latents.shape[2:]
        path = self._at(latent_frame_times(frames, step.backbone.frame_factor))
        places = self._places(step, latents)
        out = latents.clone()
        for row, own in enumerate(step.seeds):
            kept = path if places is None else path + np.append(into_view(places[row], path[:, :2]), 0.0)
            for frame in range(frames):
                seed = (own + _STREAM * (1 + frame)) % 2**63
                moved = _Move(*kept[frame], height=height, width=width)
                out[row, :, frame] = moved(latents[row, :, frame], torch.Generator().manual_seed(seed))
        return out

    def _places(self, step: DenoisingStep, latents: Tensor) -> list[np.ndarray] | None:
        """Estimates the subjects' places from what the previous step has added besides noise: a multiple of the clean latents.

        None if there was no previous step.
        """
        if not self._before:
            return None
        before, level = self._before.pop()
        added = latents.double() - before.double() * (_noise_level(step) / level)
        return [place_of(row) for row in added]

    def _at(self, times: Sequence[float]) -> np.ndarray:
        """Returns the waypoints at these frames, [len(times), 3]: the whole trajectory, however many frames are generated."""
        points = np.array(self.trajectory.points)
        last = max(times[-1], 1e-6)
        known = np.linspace(0, 1, len(points))
        return np.stack([np.interp(np.array(times) / last, known, column) for column in points.T], 1)


def _noise_level(step: DenoisingStep) -> float:
    """Returns the standard deviation of the noise in the latents of a step, in the scheduler's units."""
    noise = step.noised(torch.zeros_like(step.noise))
    return float(noise.double().norm() / step.noise.double().norm())


def place_of(clean: Tensor) -> np.ndarray:
    """Estimates where the subject is, before it moves, as [2]: right and down in fractions of the frame.

    clean: [C, f, h, w], clean latents or a multiple of them. What differs from the median of its row in the mean over frames is
    taken for the subject. In a picture without a clear subject, this is near the middle.
    """
    mean = clean.double().mean(1).cpu()
    energy = (mean - mean.median(2, keepdim=True).values).square().sum(0)
    smooth = torch.nn.functional.avg_pool2d(energy[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    weight = (smooth - smooth.quantile(0.75)).clamp_min(0)
    height, width = weight.shape
    total = float(weight.sum())
    if not total > 0:
        return np.array([0.5, 0.5])
    x = float((weight.sum(0) * (torch.arange(width) + 0.5)).sum()) / width
    y = float((weight.sum(1) * (torch.arange(height) + 0.5)).sum()) / height
    return np.array([x, y]) / total


def into_view(place: np.ndarray, path: np.ndarray, margin: float = _MARGIN) -> np.ndarray:
    """Returns the smallest shift (right, down) that keeps a path [f, 2] from `place` at least `margin` inside the frame; for a
    path that is too long, the one that centres it."""
    low, high = margin - place - path.min(0), 1 - margin - place - path.max(0)
    return np.where(low > high, (low + high) / 2, np.clip(0.0, low, np.maximum(low, high)))


class _Move:
    """Moves a frame's latents [C, h, w]: (right, down) in fractions of its size, and scaled by exp(log_size)."""

    def __init__(self, right: float, down: float, log_size: float, height: int, width: int) -> None:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        size = math.exp(log_size)
        self.rows = torch.floor((((y + 0.5) / height - 0.5 - down) / size + 0.5) * height).long()
        self.columns = torch.floor((((x + 0.5) / width - 0.5 - right) / size + 0.5) * width).long()
        self.height, self.width = height, width

    def __call__(self, plane: Tensor, draw: torch.Generator) -> Tensor:
        edge = max(1, self.width // 5)
        near = torch.randint(edge, self.rows.shape, generator=draw)
        other = torch.rand(self.rows.shape, generator=draw) < 0.5
        columns = torch.where(other, self.width - 1 - near, near).to(plane.device)
        fill = plane.gather(2, columns.expand(len(plane), -1, -1))
        inside = (self.rows >= 0) & (self.rows < self.height) & (self.columns >= 0) & (self.columns < self.width)
        kept = plane[:, self.rows.clamp(0, self.height - 1), self.columns.clamp(0, self.width - 1)]
        return torch.where(inside.to(plane.device), kept, fill)
