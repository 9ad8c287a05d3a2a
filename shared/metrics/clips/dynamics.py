"""How much moves, and how steady the frames are: always told together, for a frozen clip is the steadiest of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.clips.flow_fields import FlowFields, flow_fields
from shared.metrics.clips.tracks import Tracks, follow
from shared.metrics.scores import cosine

TOP = 0.05  # of the flow's vectors, the longest
MOVES = 6 / 256  # of the shorter side from frame to frame: VBench's threshold
OF_SIXTEEN = 4  # VBench: a clip of 16 frames is dynamic when so many steps pass the threshold
REACH = 0.03  # of the shorter side: a point that never gets this far from its start does not move
FEW = 0.03  # of the points
CHANGE = 0.1  # of the range of brightness, from frame to frame: flicker changes less than this


@dataclass(frozen=True)
class Dynamics:
    """The two that pull against each other, of one clip."""

    degree: float  # mean over frames of the longest 5 % of the flow, as a fraction of the shorter side per frame
    dynamic: bool  # whether VBench's threshold is passed
    consistency: float  # mean cosine of consecutive frames' embeddings
    consistency_all_pairs: float  # mean cosine of all pairs of frames


def dynamics(fields: FlowFields, embeddings: Tensor) -> Dynamics:
    """Dynamic degree beside temporal consistency.

    The degree is VBench's (arXiv 2311.17982, supplement, "dynamic degree"): per pair of consecutive frames the mean of
    the 5 % longest flow vectors; the clip is dynamic when it exceeds 6/256 of the shorter side in at least a quarter of
    the pairs that its frames make. Only vectors that the flow back confirms count here, or flicker would be taken for
    motion. The consistency is the frame consistency of Tune-A-Video (arXiv 2212.11565, section
    5): cosines of consecutive frames; some papers average over all pairs, which is given too.

    Args:
        embeddings: `[F, D]` of the clip's frames

    Raises:
        ValueError: fewer than two frames, or not one embedding for each
    """
    frames = len(fields.forward) + 1
    if frames < 2:
        raise ValueError("nothing can move in a clip of one frame")
    if len(embeddings) != frames:
        raise ValueError(f"{len(embeddings)} embeddings for a clip of {frames} frames: give one for each")
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
    """Whether nothing moves in a clip `[3, F, H, W]` in [-1, 1] (or its flow, and tracks where they are known): it is a
    picture, shown for a while, though it may flicker.

    That is, hardly any point gets anywhere. Points that are too fast to be followed do not either: so the flow must be
    below the threshold for "dynamic" as well, and the 5 % that change most must change little. A clip of one frame is
    frozen.
    """
    fields = clip if isinstance(clip, FlowFields) else flow_fields(clip)
    if len(fields.forward) == 0:
        return True
    moved = ((tracks or follow(fields)).reach >= REACH).double().mean()
    steps, changes = (float(_longest(each).mean()) for each in (fields.magnitudes, fields.changes))
    return float(moved) < FEW and steps < MOVES and changes < CHANGE


def _longest(values: Tensor) -> Tensor:
    """`[F-1, h, w]` -> `[F-1]`, float64: the mean of the largest 5 % of each step."""
    each = values.flatten(1).double()
    return each.topk(max(1, int(TOP * each.shape[1])), dim=1).values.mean(1)
