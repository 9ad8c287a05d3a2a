"""Makes the subject of a clip follow a path by moving it from frame to frame."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pcs_video.backbones.framewise import FramewiseCodec
from pcs_video.backbones.picture_clips import PictureClipsBackbone
from shared.attention.sparse_causal import SparseCausal
from shared.backbones.protocol import Backbone
from shared.io.trajectory_settings import Trajectory
from shared.sampling.box_tracks import latent_frame_times
from shared.sampling.hooks import DenoisingStep, SamplingHook, SamplingHookBase
from shared.sampling.sampler import output_size
from shared.sampling.schedulers import adds_noise, make_scheduler
from shared.sampling.settings import SamplingSettings

_MARGIN = 0.2  # as a fraction of the frame; about half the size of a subject
_STREAM = 2**43  # random stream for new noise, separate from those of the initial noise and of camera pans


class FollowTrajectory(SamplingHookBase):
    """Moves the subject that is being generated along a trajectory, without training.

    Once the subject has formed, it is located in the predicted clean latents. In each frame, it is then moved and
    scaled to match the trajectory. Its clean latents are interpolated bilinearly, and its noise is moved by whole
    cells. The area that the subject leaves is filled row by row from the background on both sides. The remaining steps
    blend the subject with the background. If the subject would leave the frame, the whole path is shifted. Related
    methods are FreeTraj, which moves noise along trajectories (https://arxiv.org/abs/2406.16863), and MotionBooth,
    which shifts latents to move the camera (https://arxiv.org/abs/2406.17758).

    With `layers: image`, models with separate motion layers (AnimateDiff) skip these layers. All frames then start from
    the same noise. In self-attention, they also attend to the first frame, as in Text2Video-Zero
    (https://arxiv.org/abs/2303.13439). In the resulting clip, only the subject moves.

    `VideoRunner.generate` does not use this hook for prompts that do not name the concept.
    """

    kind: Literal["follow_trajectory"] = "follow_trajectory"
    name: str  # the concept's name
    trajectory: Trajectory

    def resting(self) -> FollowTrajectory:
        """Returns a hook for the same concept that moves nothing."""
        return self.model_copy(update={"trajectory": Trajectory()})

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> SamplingHook:
        """Returns the hook that moves the subject, or a hook that does nothing if a picture is generated."""
        *frames, _, _ = output_size(backbone, settings)
        if not frames or not self.trajectory.points:
            return SamplingHookBase()
        alone = backbone.frames_apart and self.trajectory.layers == "image"
        alone = alone or isinstance(backbone, PictureClipsBackbone)
        hook = (FollowingByFrame if alone else Following)(trajectory=self.trajectory)
        return hook.ready(backbone, settings)


class ByFrame(SamplingHookBase):
    """Generates clips with only the image layers. The frames are identical unless another hook changes them.

    All frames start from the same noise. In self-attention, each frame attends to the first frame and to itself.
    """

    def ready(self, backbone: Backbone, settings: SamplingSettings) -> ByFrame:
        """Returns the hook itself. Raises ValueError if the scheduler adds noise in its steps, because that noise would
        be different in each frame."""
        if len(output_size(backbone, settings)) == 3 and adds_noise(make_scheduler(backbone, settings.scheduler)):
            name = settings.scheduler or f"the scheduler of {backbone.name}"
            raise ValueError(
                f"{name} adds different noise to each frame, so without a motion module the frames would be inconsistent; "
                "use a deterministic scheduler (ddim, dpm++, euler …)"
            )
        return self

    def initial_noise(self, backbone: Backbone, noise: Tensor) -> Tensor:
        return noise[:, :, :1].expand_as(noise).clone() if noise.ndim == 5 else noise

    @contextmanager
    def during(self, step: DenoisingStep) -> Iterator[None]:
        backbone = step.backbone
        if step.noise.ndim == 4 or not isinstance(backbone, FramewiseCodec):
            yield
            return
        with backbone.image_layers(), backbone.attending(*SparseCausal(frames=("first", "own")).edits(backbone)):
            yield


class Following(SamplingHookBase):
    """Moves the subject along a trajectory during one call of the sampler (see `FollowTrajectory`)."""

    trajectory: Trajectory

    def jumps(self, step: DenoisingStep) -> bool:
        calls = math.ceil(self.trajectory.start * step.steps / step.order) * step.order
        return step.index == min(calls, (step.steps - 1) // step.order * step.order)

    def latents(self, step: DenoisingStep, latents: Tensor) -> Tensor:
        if not self.jumps(step):
            return latents
        signal, noisy = step.levels
        clean = torch.zeros_like(latents).float() if step.clean is None else step.clean.float()
        noise = (latents.float() - signal * clean) / noisy
        path = self._at(latent_frame_times(latents.shape[2], step.backbone.frame_factor))
        rows = zip(clean, noise, step.seeds, strict=True)
        out = [self._moved(x, eps, path, seed) for x, eps, seed in rows]
        return torch.stack([signal * x + noisy * eps for x, eps in out]).to(latents.dtype)

    def _moved(self, clean: Tensor, noise: Tensor, path: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
        """Moves the subject of one clip to the waypoint of each frame on the path ([f, 3]). Returns the new clean
        latents and the new noise, each [C, f, h, w]."""
        mask = subject_mask(clean)
        place = centre_of(mask)
        path = path + np.append(into_view(place, path[:, :2]), 0.0)
        fresh = self._fresh(noise, torch.Generator().manual_seed((seed + _STREAM) % 2**63))
        subject = _Subject(widened(mask), place)
        frames = [subject.moved(clean[:, f], noise[:, f], fresh[:, f], *path[f]) for f in range(len(path))]
        cleans, noises = zip(*frames, strict=True)
        return torch.stack(cleans, 1), torch.stack(noises, 1)

    def _fresh(self, noise: Tensor, draw: torch.Generator) -> Tensor:
        return torch.randn(noise.shape, generator=draw).to(noise)

    def _at(self, times: Sequence[float]) -> np.ndarray:
        """Returns the waypoints at these times, [len(times), 3]. The trajectory is stretched over the whole clip."""
        points = np.array(self.trajectory.points)
        last = max(times[-1], 1e-6)
        known = np.linspace(0, 1, len(points))
        return np.stack([np.interp(np.array(times) / last, known, column) for column in points.T], 1)


class FollowingByFrame(Following, ByFrame):
    """Moves the subject along a trajectory, and generates the clip with only the image layers."""

    def _fresh(self, noise: Tensor, draw: torch.Generator) -> Tensor:
        """Draws noise that, like the initial noise, is the same in all frames, so the background does not change."""
        return super()._fresh(noise[:, :1], draw).expand_as(noise)


def subject_mask(clean: Tensor) -> Tensor:
    """Returns a bool mask [h, w] of the subject in clean latents [C, f, h, w], which may be scaled by a constant.

    The mask contains the cells whose mean over all frames differs most from the median of their row. It uses Otsu's
    threshold, restricted so that the mask covers at most half of the frame. If the latents are uniform, the mask is the
    whole frame.
    """
    mean = clean.double().mean(1).cpu()
    far = (mean - mean.median(2, keepdim=True).values).square().sum(0).sqrt()
    reach = _border(far)
    smooth = functional.avg_pool2d(far[None, None], 2 * reach + 1, 1, reach, count_include_pad=False)[0, 0]
    return smooth >= _threshold(smooth.flatten().numpy())


def _threshold(values: np.ndarray) -> float:
    """Returns Otsu's threshold for values [n], chosen from the thresholds that at most half of the values
    reach."""
    values = np.sort(values)
    n, total = len(values), values.sum()
    above = np.arange(1, n // 2 + 1)  # the number of values that reach each threshold
    high = np.cumsum(values[::-1])[: n // 2]
    between = above * (n - above) * (high / above - (total - high) / (n - above)) ** 2
    return float(values[n - above[between.argmax()]])


def centre_of(mask: Tensor) -> np.ndarray:
    """Returns the centre of a mask [h, w] as (right, down) in fractions of the frame."""
    y, x = (mask.nonzero().double().mean(0) + 0.5) / torch.tensor(mask.shape)
    return np.array([float(x), float(y)])


def widened(mask: Tensor) -> Tensor:
    """Returns the bool mask [h, w] widened in all directions by one sixteenth of its shorter side, but at least by one
    cell."""
    reach = _border(mask)
    return functional.max_pool2d(mask.double()[None, None], 2 * reach + 1, 1, reach)[0, 0] > 0


def _border(plane: Tensor) -> int:
    return max(1, min(plane.shape) // 16)


def into_view(place: np.ndarray, path: np.ndarray, margin: float = _MARGIN) -> np.ndarray:
    """Returns the smallest shift (right, down) that keeps a path at least `margin` away from the edges of the frame. A
    path that is too long for this is centred. The path ([f, 2]) is relative to the position `place`."""
    low, high = margin - place - path.min(0), 1 - margin - place - path.max(0)
    return np.where(low > high, (low + high) / 2, np.clip(0.0, low, np.maximum(low, high)))


class _Subject:
    """Moves a subject within frames [C, h, w]. `mask` ([h, w]) covers the subject, and `place` is its centre in fractions of
    the frame."""

    def __init__(self, mask: Tensor, place: np.ndarray) -> None:
        self.mask, self.place = mask, place
        self.left, self.right, self.share = _around(mask)

    def moved(
        self, clean: Tensor, noise: Tensor, fresh: Tensor, right: float, down: float, log_size: float
    ) -> tuple[Tensor, Tensor]:
        """Returns the clean latents and the noise after moving the subject by (right, down) and scaling it by
        exp(log_size). Cells in the subject's old and new areas that receive no moved noise get noise from `fresh`."""
        height, width = self.mask.shape
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        size = math.exp(log_size)
        x = (x - self.place[0] - right) / size + self.place[0]
        y = (y - self.place[1] - down) / size + self.place[1]
        grid = torch.stack([2 * x - 1, 2 * y - 1], -1)[None].to(clean)
        mask = self.mask.to(clean.device)
        covers = _sampled(mask[None].to(clean), grid, "zeros")
        cleaned = covers * _sampled(clean, grid, "border") + (1 - covers) * self._background(clean)
        columns, rows = torch.floor(x * width).long(), torch.floor(y * height).long()
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        on = inside & self.mask[rows, columns]
        once = on & _first(torch.where(on, rows * width + columns, -1))  # noise used twice would be correlated
        new = (self.mask | on).to(clean.device)
        noises = torch.where(once.to(clean.device), noise[:, rows, columns], torch.where(new, fresh, noise))
        return cleaned, noises

    def _background(self, clean: Tensor) -> Tensor:
        """Returns the clean latents [C, h, w] with the subject's area replaced by interpolation along each row."""
        left, right, share = (part.to(clean.device) for part in (self.left, self.right, self.share))
        left, right = (clean.gather(2, column.expand_as(clean)) for column in (left, right))
        return torch.lerp(left, right, share.to(clean).expand_as(clean))


def _around(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns three planes [h, w]: the columns of the nearest unmasked cells to the left and to the right of each cell,
    and the cell's relative position between these columns, from 0 to 1. For an unmasked cell, both columns are its own.
    Fully masked rows use the edges of the frame."""
    height, width = mask.shape
    columns = np.arange(width)
    left, right, share = np.zeros((height, width), int), np.zeros((height, width), int), np.zeros((height, width))
    for y, row in enumerate(mask.numpy()):
        free = np.flatnonzero(~row) if not row.all() else np.array([0, width - 1])
        after = np.searchsorted(free, columns).clip(0, len(free) - 1)
        before = (np.searchsorted(free, columns, side="right") - 1).clip(0)
        left[y], right[y] = free[before], free[after]
        share[y] = (columns - left[y]) / np.maximum(right[y] - left[y], 1)
    return torch.from_numpy(left), torch.from_numpy(right), torch.from_numpy(share.clip(0, 1))


def _sampled(planes: Tensor, grid: Tensor, beyond: str) -> Tensor:
    return functional.grid_sample(planes[None], grid, padding_mode=beyond, align_corners=False)[0]


def _first(numbers: Tensor) -> Tensor:
    """Returns a bool tensor of the same shape, which is True where a number occurs for the first time."""
    flat = numbers.flatten().numpy()
    first = np.zeros(flat.shape, bool)
    first[np.unique(flat, return_index=True)[1]] = True
    return torch.from_numpy(first).view(numbers.shape)
