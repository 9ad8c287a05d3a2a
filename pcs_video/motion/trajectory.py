"""Learns where a motion takes its subject, as a path measured on the clips, and makes generated clips follow it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from pcs_video.motion.clip_source import Clips
from shared.backbones.protocol import Backbone
from shared.config import Part
from shared.io.clips.read_clip import Clip, read_windows
from shared.masks.track import Track
from shared.metrics.clips.tracks import track_points
from shared.sampling.box_tracks import latent_frame_times
from shared.sampling.hooks import DenoisingStep, SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.settings import SamplingSettings
from shared.types import Subject

Fraction = Annotated[float, Field(ge=0, le=1)]
Offset = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
#: Right and down, as fractions of the width and height, and the natural logarithm of the size.
Waypoint = tuple[Offset, Offset, Offset]
_LEAST_REACH = 0.03  # of the shorter side: what moves less counts as standing still
_MARGIN = 0.2  # of the frame: about half the size of a subject
_STREAM = 2**41  # random stream for filling what comes into view, separate from the noise and from the camera's


class Trajectory(Part):
    """Where the subject of a motion goes, and when in sampling it is moved there."""

    start: Fraction = 0.2  # fraction of the steps done when the latents are shifted
    points: tuple[Waypoint, ...] = ()  # one per frame, relative to their mean; (): measured on the clips

    def scaled(self, factor: float) -> Trajectory:
        """Returns the trajectory with every offset multiplied by `factor`, within the allowed range."""
        points = tuple(tuple(max(-2.0, min(2.0, factor * v)) for v in point) for point in self.points)
        return self.model_copy(update={"points": points})


def measure(subject: Subject, source: Clips, side: int) -> tuple[Waypoint, ...]:
    """Measures the mean trajectory of the moving thing in a subject's clips.

    With masks (for each frame, or one that is tracked), it is the path of the mask's centre and the square root of its area;
    otherwise that of the points that move at least half as far as the farthest. Frames without a mask are interpolated.

    Args:
        source: sets the frames that are read; every window counts as one clip
        side: of the square frames, in pixels

    Raises:
        ValueError: naming the clip, if nothing in it moves; or if clips differ in their number of frames
    """
    paths: dict[str, np.ndarray] = {}
    for path in subject.clips:
        for number, clip in enumerate(read_windows(path, source.window, side, source.fit, subject.masks.get(path))):
            paths[f"{path} ({number})" if number else str(path)] = _path(clip, str(path))
    lengths = {len(path) for path in paths.values()}
    if len(lengths) != 1:
        raise ValueError(
            f"sampling.trajectory: the clips have {sorted(lengths)} frames: set sources.clips.window.length, so that their "
            "paths can be averaged"
        )
    mean = np.clip(np.mean([path - path.mean(0) for path in paths.values()], axis=0), -2, 2)
    return tuple((round(float(x), 4), round(float(y), 4), round(float(size), 4)) for x, y, size in mean)


def _path(clip: Clip, name: str) -> np.ndarray:
    """Returns right, down and logarithm of the size for each frame, [F, 3]."""
    path = _of_points(clip.frames) if clip.masks is None else _of_masks(clip)
    reach = float(np.abs(path - path.mean(0)).max())
    if not reach > _LEAST_REACH:
        raise ValueError(f"sampling.trajectory: nothing moves in {name}, so it has no trajectory; leave it out")
    return path


def _of_masks(clip: Clip) -> np.ndarray:
    masks = clip.masks
    assert masks is not None
    if masks.shape[1] == 1 < clip.frames.shape[1]:
        masks = Track().follow(clip.frames, masks[:, 0])
    weight = masks[0].double()
    area = weight.sum((1, 2))
    height, width = weight.shape[1:]
    x = (weight.sum(1) * (torch.arange(width) + 0.5) / width).sum(1) / area
    y = (weight.sum(2) * (torch.arange(height) + 0.5) / height).sum(1) / area
    found = torch.stack([x, y, 0.5 * area.log()], 1).numpy()
    seen = (area > 0).numpy()
    frames = np.arange(len(found))
    return np.stack([np.interp(frames, frames[seen], column[seen]) for column in found.T], 1)


def _of_points(frames: Tensor) -> np.ndarray:
    tracks = track_points(frames)
    height, width = tracks.size
    moving = tracks.reach > max(_LEAST_REACH, 0.5 * float(tracks.reach.max()))
    if not bool(moving.any()):
        return np.zeros((tracks.frames, 3))
    points, visible = tracks.points[moving].double().numpy(), tracks.visible[moving].numpy()
    path, steps = [np.zeros(3)], [np.zeros(3)]
    for f in range(1, tracks.frames):
        both = visible[:, f]  # a point that is visible was visible before
        if both.any():
            before, now = points[both, f - 1], points[both, f]
            shift, sizes = np.median(now - before, axis=0), [_spread(now), _spread(before)]
            steps.append(np.array([shift[0] / width, shift[1] / height, np.log(sizes[0] / sizes[1])]))
        path.append(path[-1] + steps[-1])  # if no point is left, it goes on as before
    return np.stack(path)


def _spread(points: np.ndarray) -> float:
    """Returns the median distance of points [N, 2] from their median, at least half a pixel."""
    return max(0.5, float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1))))


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
