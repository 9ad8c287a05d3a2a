"""Measures the path along which a motion takes its subject, so that new clips can follow it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pcs_video.motion.clip_source import Clips
from shared.io.clips.read_clip import Clip
from shared.io.trajectory_settings import Waypoint
from shared.metrics.clips.tracks import track_points
from shared.types import Subject

_LEAST_REACH = 0.03  # as a fraction of the frame; anything that moves less counts as standing still


def one_motion(subjects: Mapping[str, Subject]) -> Subject:
    """Returns the only subject that has clips. Raises ValueError if no subject or more than one has clips."""
    moving = [subject for subject in subjects.values() if subject.clips]
    if len(moving) != 1:
        raise ValueError(
            "sampling.trajectory is measured on the clips of exactly one motion; give subject.clips=FOLDER"
        )
    return moving[0]


def measure(subject: Subject, source: Clips, side: int) -> tuple[Waypoint, ...]:
    """Returns the mean trajectory of the moving subject over the clips of a motion.

    With masks (one per frame, or one that is tracked), the trajectory follows the mask's centre and the square root of its
    area, and frames whose mask is empty are interpolated. Without masks, it follows the points that move at least half as far
    as the point that moves farthest.

    Args:
        source: reads the clips; every window counts as a clip
        side: the side length of the square frames, in pixels

    Raises:
        ValueError: when nothing moves in a clip (the message names the clip), or when clips differ in their frame count
    """
    paths = [_path(clip, str(path)) for path in subject.clips for clip in source.windows(subject, path, side)]
    lengths = {len(path) for path in paths}
    if len(lengths) != 1:
        raise ValueError(
            f"sampling.trajectory: the clips differ in length ({', '.join(map(str, sorted(lengths)))} frames); set "
            "sources.clips.window.length, so that their paths can be averaged"
        )
    mean = np.clip(np.mean([path - path.mean(0) for path in paths], axis=0), -2, 2)
    return tuple((round(float(x), 4), round(float(y), 4), round(float(size), 4)) for x, y, size in mean)


def _path(clip: Clip, name: str) -> np.ndarray:
    """Returns the position (right, down) and the logarithm of the size in each frame, [F, 3]."""
    path = _of_points(clip.frames) if clip.masks is None else _of_masks(clip.masks)
    reach = float(np.abs(path - path.mean(0)).max())
    if not reach > _LEAST_REACH:
        raise ValueError(f"sampling.trajectory: nothing moves across the frame in {name}; leave this clip out")
    return path


def _of_masks(masks: Tensor) -> np.ndarray:
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
        both = visible[:, f]  # these points were also visible in the previous frame
        if both.any():
            before, now = points[both, f - 1], points[both, f]
            shift, sizes = np.median(now - before, axis=0), [_spread(now), _spread(before)]
            steps.append(np.array([shift[0] / width, shift[1] / height, np.log(sizes[0] / sizes[1])]))
        path.append(path[-1] + steps[-1])  # if no point is visible, the last step is repeated
    return np.stack(path)


def _spread(points: np.ndarray) -> float:
    """Returns the median distance of points [N, 2] from their median, but at least half a pixel."""
    return max(0.5, float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1))))
