"""Measures how similarly two clips move, with a motion fidelity that is symmetric and also covers still clips.

The original motion fidelity is from Yatim et al., "Space-Time Diffusion Features for Zero-Shot Text-Driven Motion
Transfer" (arXiv 2311.17009, eq. 8 and 9): tracks are compared by the cosine of their frame-to-frame displacements,
averaged over time, and each track is scored by its best match in the other clip. Their released script averages over
one clip only, subtracts an identity matrix (so identical clips score less than 1) and divides by 0 where a track is
still.

Here, both directions count equally, and a clip compared with itself scores exactly 1. Only moving tracks are compared.
Almost every clip has a still background, so a frozen clip would otherwise score as well as a moving one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shared.metrics.clips.tracks import Tracks

MOVES = 0.03  # fraction of the frame's shorter side; a track that never gets this far from its start counts as still
STILL = 0.004  # fraction of the shorter side per frame; displacements far below this count as rest
SEEN = 0.4  # share of frames in which a track, or both tracks of a compared pair, must be visible
MOST = 256  # maximum number of tracks compared per clip; if there are more, evenly spaced ones are chosen


def motion_fidelity(a: Tracks, b: Tracks, compensate_camera: bool = False) -> float:
    """Returns the motion fidelity of two clips, in [-1, 1].

    Each track is scored by its best match in the other clip. The result is the mean of the two clips' average scores.

    The match of displacements v and w is (v·w + e²) / (sqrt(v² + e²) sqrt(w² + e²)), with e = `STILL`. This is their
    cosine if both are fast, 1 if both are at rest, and about 0 if only one is at rest. The match is averaged over the
    frames in which both tracks are visible.

    The result is 1 for a clip compared with itself and for two clips in which nothing moves, 0 if something moves in
    only one of them, and about -1 for opposite directions. If one clip has more frames, its tracks are resampled to the
    frame count of the other.

    Args:
        compensate_camera: whether to subtract, in each frame, the median displacement of all visible tracks. This
            median is the camera's motion as long as fewer than half of the tracks are on the thing

    Raises:
        ValueError: if a clip has only one frame
    """
    frames = min(a.frames, b.frames)
    if frames < 2:
        raise ValueError("motion fidelity compares displacements between frames, but a clip of one frame has none")
    (first, first_known), (second, second_known) = (_moving(resampled(t, frames), compensate_camera) for t in (a, b))
    if not len(first) or not len(second):
        return float(len(first) == len(second))
    match = _matches(first, first_known, second, second_known)
    return float((match.amax(1).mean() + match.amax(0).mean()) / 2)


def resampled(tracks: Tracks, frames: int) -> Tracks:
    """Resamples tracks linearly to another number of evenly spaced frames, keeping the first and the last frame. A
    point is visible in a new frame if it is visible in both neighbouring original frames."""
    if frames == tracks.frames:
        return tracks
    at = torch.linspace(0, tracks.frames - 1, frames, dtype=torch.float64)
    low = at.floor().long().clamp(max=max(tracks.frames - 2, 0))
    high = (low + 1).clamp(max=tracks.frames - 1)
    part = (at - low)[:, None]
    points = tracks.points[:, low] * (1 - part) + tracks.points[:, high] * part
    return Tracks(points, tracks.visible[:, low] & tracks.visible[:, high], tracks.size)


def _moving(tracks: Tracks, compensate_camera: bool) -> tuple[Tensor, Tensor]:
    """Returns the displacements `[N, F-1, 2]` of the moving tracks, as fractions of the shorter side, and whether each
    displacement is known."""
    steps = tracks.points.double().diff(dim=1) / min(tracks.size)
    known = tracks.visible[:, 1:] & tracks.visible[:, :-1]
    if compensate_camera:
        hidden = torch.where(known[..., None], steps, torch.full_like(steps, torch.nan))
        steps = steps - hidden.nanmedian(0).values.nan_to_num()
    steps = steps * known[..., None]
    far = steps.cumsum(1).norm(dim=2).amax(1) >= MOVES
    chosen = (far & (known.double().mean(1) >= SEEN)).nonzero()[:, 0]
    if len(chosen) > MOST:
        chosen = chosen[torch.linspace(0, len(chosen) - 1, MOST).round().long()]
    return steps[chosen], known[chosen]


def _matches(a: Tensor, a_known: Tensor, b: Tensor, b_known: Tensor) -> Tensor:
    """Returns how well each track of `a` matches each track of `b`, `[N, M]`. A match is 0 if too few frames show both.

    With unit vectors u = (v, e) / |(v, e)|, the match is u·u' = 1 - |u - u'|² / 2. The second form is used, because it
    is exactly 1 for equal tracks.
    """
    one, two = _directions(a), _directions(b)
    out = torch.empty(len(a), len(b), dtype=torch.float64)
    for i in range(len(a)):
        shared = a_known[i] & b_known
        apart = (one[i] - two).square().sum(2)
        count = shared.sum(1)
        mean = (apart * shared).sum(1) / count.clamp_min(1)
        out[i] = torch.where(count >= SEEN * shared.shape[1], 1 - mean / 2, torch.zeros_like(mean))
    return out


def _directions(steps: Tensor) -> Tensor:
    still = torch.full_like(steps[..., :1], STILL)
    raised = torch.cat([steps, still], -1)
    return raised / raised.norm(dim=-1, keepdim=True)
