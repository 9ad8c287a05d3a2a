"""How much moves, and how steady the frames are: always told together, for a frozen clip is the steadiest of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shared.metrics.clips.flow_fields import FlowFields, flow_fields
from shared.metrics.scores import cosine

TOP = 0.05  # of the flow's vectors, the longest
MOVES = 6 / 256  # of the shorter side from frame to frame: VBench's threshold
OF_SIXTEEN = 4  # VBench: a clip of 16 frames is dynamic when so many steps pass the threshold
FROZEN = 0.5 / 256  # of the shorter side: half a pixel of a clip of 256, which is the flicker of an autoencoder


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
    the pairs that its frames make. The consistency is the frame consistency of Tune-A-Video (arXiv 2212.11565, section
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
    steps = _step_lengths(fields)
    needed = max(1, round(OF_SIXTEEN * frames / 16))
    between = cosine(embeddings, embeddings)
    pairs = between[tuple(torch.triu_indices(frames, frames, 1))]
    return Dynamics(
        degree=float(steps.mean()),
        dynamic=int((steps > MOVES).sum()) >= needed,
        consistency=float(between.diagonal(1).mean()),
        consistency_all_pairs=float(pairs.mean()),
    )


def frozen(clip: Tensor | FlowFields) -> bool:
    """Whether nothing moves in a clip `[3, F, H, W]` in [-1, 1] (or its flow): it is a picture, shown for a while.

    A clip of one frame is frozen.
    """
    fields = clip if isinstance(clip, FlowFields) else flow_fields(clip)
    return len(fields.forward) == 0 or float(_step_lengths(fields).mean()) < FROZEN


def _step_lengths(fields: FlowFields) -> Tensor:
    """`[F-1]`, float64: the mean of the longest 5 % of the flow from each frame to the next, in shorter sides."""
    lengths = fields.magnitudes().flatten(1).double()
    return lengths.topk(max(1, int(TOP * lengths.shape[1])), dim=1).values.mean(1)
