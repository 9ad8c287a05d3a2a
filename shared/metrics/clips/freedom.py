"""Measures freedom in clips: how differently the clips of one prompt show their subject at the same moment.

Only crops of the subject are compared, so neither a different background nor a different position counts as a different
pose.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from torch import Tensor

from shared.metrics.freedom import Pairs, Range
from shared.metrics.scores import cosine


def freedom_of_clips(crops: Tensor, verified: Tensor, prompts: Sequence[Hashable], scale: Range) -> list[float]:
    """Returns each clip's freedom in [0, 1], on the scale for pictures of the same subject.

    Freedom is 0 if the other clips of the prompt show the subject in the same pose at every moment, and NaN if the
    subject is verified in too few pairs of frames.

    Args:
        crops: embeddings of f frames of each clip, cropped to the subject, `[N, f, D]`
        verified: whether each frame shows the subject, bool `[N, f]`
        prompts: the prompt of each clip
    """
    if not len(crops) == len(verified) == len(prompts):
        raise ValueError(f"{len(crops)} clips, {len(verified)} rows of flags and {len(prompts)} prompts")
    return [_of_clip(i, crops, verified, prompts, scale) for i in range(len(crops))]


def _of_clip(i: int, crops: Tensor, verified: Tensor, prompts: Sequence[Hashable], scale: Range) -> float:
    others = [j for j, prompt in enumerate(prompts) if j != i and prompt == prompts[i]]
    distances = [
        1 - float(cosine(crops[i, f : f + 1], crops[j, f : f + 1]))
        for j in others
        for f in range(crops.shape[1])
        if verified[i, f] and verified[j, f]
    ]
    found = scale.freedom(Pairs(len(others) * crops.shape[1], len(distances), sum(distances)))
    return math.nan if found is None else found
