"""Trajectories for tests, and clips of a square that moves along a trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pcs_video.motion.follow_trajectory import FollowTrajectory
from shared.io.trajectory_settings import Trajectory

SIDE = 64


def drawn(path: np.ndarray, size: float = 0.25) -> tuple[Tensor, Tensor]:
    """Draws a textured square whose centre and size follow `path` (`[F, 3]`).

    Returns the frames, `[3, F, S, S]` in [-1, 1], and the masks, `[F, S, S]`.
    """
    draw = torch.Generator().manual_seed(0)
    ground = torch.rand(3, SIDE, SIDE, generator=draw) * 0.2
    pattern = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=draw), (SIDE, SIDE), mode="bilinear")[0]
    y, x = torch.meshgrid((torch.arange(SIDE) + 0.5) / SIDE, (torch.arange(SIDE) + 0.5) / SIDE, indexing="ij")
    frames, masks = [], []
    for right, down, log_size in path:
        u, v = ((x - right) / np.exp(log_size) / size, (y - down) / np.exp(log_size) / size)
        inside = (u.abs() < 0.5) & (v.abs() < 0.5)
        at = torch.stack([2 * u, 2 * v], -1)[None].float()
        look = torch.nn.functional.grid_sample(pattern[None], at, padding_mode="border", align_corners=False)[0]
        frames.append(torch.where(inside, 0.3 + 0.7 * look, ground))
        masks.append(inside.float())
    return (torch.stack(frames, 1).clamp(0, 1) * 2 - 1), torch.stack(masks)


def arc(frames: int = 8, growth: float = 0.0) -> np.ndarray:
    t = np.linspace(0, 1, frames)
    return np.stack([0.3 + 0.4 * t, 0.6 - 0.25 * np.sin(np.pi * t), growth * t], 1)


def path_of(points: Sequence[Sequence[float]] | np.ndarray, **more: Any) -> Trajectory:
    return Trajectory(points=tuple(map(tuple, np.asarray(points).tolist())), **more)


def hook_of(points: np.ndarray, start: float = 0.3) -> FollowTrajectory:
    return FollowTrajectory(name="m", trajectory=path_of(points, start=start))
