"""Measures how much moves in a clip and how steady its frames are.

Always report both measures, because a frozen clip is the steadiest of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.clips.flow_fields import FlowFields, flow_fields
from shared.metrics.clips.tracks import Tracks, follow
from shared.metrics.scores import cosine

TOP = 0.05  # share of the flow vectors that are averaged, starting with the longest
MOVES = 6 / 256  # VBench's threshold, as a fraction of the shorter side per frame
OF_SIXTEEN = 4  # VBench: a 16-frame clip is dynamic when this many steps exceed the threshold
REACH = 0.03  # fraction of the shorter side; a point that never gets this far from its start counts as still
FEW = 0.03  # share of the points that may move in a frozen clip
CHANGE = 0.1  # fraction of the brightness range per frame; flicker stays below it


@dataclass(frozen=True)
class Dynamics:
    """The dynamic degree and temporal consistency of one clip, which trade off against each other."""

    degree: float  # mean length of the longest 5% of the flow vectors, as a fraction of the shorter side per frame
    dynamic: bool  # whether enough frame pairs exceed VBench's threshold
    consistency: float  # mean cosine of consecutive frames' embeddings
    consistency_all_pairs: float  # mean cosine of all pairs of frames


def dynamics(fields: FlowFields, embeddings: Tensor) -> Dynamics:
    """Measures dynamic degree and temporal consistency.

    The degree follows VBench (arXiv 2311.17982, supplement, "dynamic degree"): for each pair of consecutive frames, it
    is the mean length of the longest 5% of the flow vectors. The clip is dynamic when this mean exceeds 6/256 of the
    shorter side in at least F/4 of the F - 1 pairs. Only vectors confirmed by the backward flow count, so that flicker
    is not mistaken for motion. The consistency is the frame consistency of Tune-A-Video (arXiv 2212.11565, section 5),
    the mean cosine of consecutive frames. Some papers average over all pairs of frames, so that mean is returned too.

    Args:
        embeddings: one for each of the clip's frames, `[F, D]`

    Raises:
        ValueError: if there are fewer than two frames, or not exactly one embedding per frame
    """
    frames = len(fields.forward) + 1
    if frames < 2:
        raise ValueError("nothing can move in a clip of one frame")
    if len(embeddings) != frames:
        raise ValueError(f"{len(embeddings)} embeddings for a clip of {frames} frames: give one per frame")
    steps = _longest(fields.magnitudes)
    needed = max(1, round(OF_SIXTEEN * frames / 16))
    between = cosine(embeddings, embeddings).clamp(-1, 1)  # rounding can put a cosine above 1
    pairs = between[tuple(torch.triu_indices(frames, frames, 1))]
    return Dynamics(
        degree=float(steps.mean()),
        dynamic=int((steps > MOVES).sum()) >= needed,
        consistency=float(between.diagonal(1).mean()),
        consistency_all_pairs=float(pairs.mean()),
    )


def frozen(clip: Tensor | FlowFields, tracks: Tracks | None = None) -> bool:
    """Returns whether nothing moves in a clip. Flicker does not count as motion.

    In a frozen clip, almost no tracked point moves away from its start. Points that move too fast to be tracked also
    seem still. The flow must therefore be below the threshold for "dynamic" as well, and the 5% of cells that change
    most must change little. A clip of one frame is frozen.

    Args:
        clip: pixels `[3, F, H, W]` in [-1, 1], or the clip's flow
        tracks: the clip's tracks, if they are known
    """
    fields = clip if isinstance(clip, FlowFields) else flow_fields(clip)
    if len(fields.forward) == 0:
        return True
    moved = ((tracks or follow(fields)).reach >= REACH).double().mean()
    steps, changes = (float(_longest(each).mean()) for each in (fields.magnitudes, fields.changes))
    return float(moved) < FEW and steps < MOVES and changes < CHANGE


def _longest(values: Tensor) -> Tensor:
    """Returns, for each step of `values` (`[F-1, h, w]`), the mean of the largest 5% of its values, as float64
    `[F-1]`."""
    each = values.flatten(1).double()
    return each.topk(max(1, int(TOP * each.shape[1])), dim=1).values.mean(1)
