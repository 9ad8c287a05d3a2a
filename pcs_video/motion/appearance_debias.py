"""The loss that looks at how frames differ, and not at what they have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from shared.regularize.base import Penalty
from shared.types import Step


class AppearanceDebias(Penalty):
    """MotionDirector's appearance-debiased loss (https://arxiv.org/abs/2310.08465, eq. 6 and 7), for epsilon, v and flow.

    phi(z_i) = sqrt(beta^2 + 1) z_i - beta z_a for every frame i and one frame a, drawn anew in each step; the penalty is
    the mean of |phi(target) - phi(prediction)|^2. With beta = 1 and 16 frames an error that all frames share weighs 0.17
    of what it weighs in the plain loss, one that is each frame's own 2.8 times as much: what a clip looks like is learned
    less than how it moves. Where masks or padding say that some places count less, they do here, too: the difference of two
    frames counts as much as the one that counts less there.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss_weight"})
    kind: Literal["appearance_debias"] = "appearance_debias"
    weight: Annotated[float, Field(ge=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 1.0

    def __call__(self, step: Step) -> Tensor:
        """ValueError for pictures: they have no frames that could differ."""
        if step.prediction.ndim != 5:
            raise ValueError("regularize.appearance_debias compares the frames of clips, and this batch holds pictures")
        rows, frames = len(step.prediction), step.prediction.shape[2]
        draw = torch.Generator().manual_seed(step.index)
        anchors = torch.randint(frames, (rows,), generator=draw)
        error = debiased_error(step.prediction - step.target, anchors, self.beta)
        weight: Tensor | None = step.need("loss_weight")
        if weight is None:
            return self.weight * error.mean()
        weight = weight.to(error)
        weight = torch.minimum(weight, _anchor_of(weight, anchors)).expand_as(error)
        each = (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)
        return self.weight * each.mean()


def debiased_error(error: Tensor, anchors: Tensor, beta: float) -> Tensor:
    """|phi(error)|^2, of the shape of `error` [B, C, F, h, w]; phi is linear, so that of a difference is the difference.

    Args:
        anchors: [B], the number of the frame that each row's others are compared with
    """
    error = error.float()
    return ((beta**2 + 1) ** 0.5 * error - beta * _anchor_of(error, anchors)).square()


def _anchor_of(clips: Tensor, anchors: Tensor) -> Tensor:
    """[B, C, F, h, w] -> [B, C, 1, h, w]."""
    return clips[torch.arange(len(clips)), :, anchors].unsqueeze(2)
