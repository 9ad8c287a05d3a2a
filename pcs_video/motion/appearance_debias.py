"""A loss on the differences between frames, which gives little weight to errors that all frames share."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from shared.config import NotNegative
from shared.regularize.base import Penalty
from shared.types import Step


class AppearanceDebias(Penalty):
    """MotionDirector's appearance-debiased loss (https://arxiv.org/abs/2310.08465, eqs. 6 and 7), for epsilon, v and
    flow prediction.

    For every frame i, phi(z_i) = sqrt(beta^2 + 1) z_i - beta z_a, where a is a frame drawn at random for each example.
    The penalty is the mean of |phi(target) - phi(prediction)|^2 over instance examples. With beta = 1 and 16 frames, an
    error that all frames share has 0.17 times the weight that it has in the plain loss, and errors that are independent
    between frames have 2.8 times that weight. The penalty therefore emphasizes a clip's motion over its appearance.
    Weights from masks or padding also apply to the penalty. At each position, the difference between two frames gets
    the lower of the two frames' weights.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"loss_weight"})
    kind: Literal["appearance_debias"] = "appearance_debias"
    weight: NotNegative = 1.0  # multiplies the penalty
    beta: NotNegative = 1.0  # factor of the frame z_a; 0 gives the plain loss

    def __call__(self, step: Step) -> Tensor:
        """Returns the penalty. Raises ValueError if the batch contains pictures, which have no frames to compare."""
        if step.prediction.ndim != 5:
            raise ValueError("regularize.appearance_debias compares frames of clips, but this batch contains pictures")
        instance = step.batch.with_role("instance").to(step.prediction.device)
        error = (step.prediction - step.target)[instance]
        anchors = torch.randint(error.shape[2], (len(error),), generator=step.draw)
        error = debiased_error(error, anchors, self.beta)
        weight: Tensor | None = step.need("loss_weight")
        if weight is None:
            return self.weight * error.mean()
        weight = weight[instance.to(weight.device)].to(error)
        weight = torch.minimum(weight, _anchor_of(weight, anchors)).expand_as(error)
        each = (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)
        return self.weight * each.mean()


def debiased_error(error: Tensor, anchors: Tensor, beta: float) -> Tensor:
    """Returns |phi(error)|^2, in the shape of `error` [B, C, F, h, w].

    Because phi is linear, this is |phi(target) - phi(prediction)|^2 for the error target - prediction.

    Args:
        anchors: the index of the frame with which each row's frames are compared, [B]
    """
    error = error.float()
    return ((beta**2 + 1) ** 0.5 * error - beta * _anchor_of(error, anchors)).square()


def _anchor_of(clips: Tensor, anchors: Tensor) -> Tensor:
    """Returns one frame of each clip, [B, C, F, h, w] -> [B, C, 1, h, w]."""
    return clips[torch.arange(len(clips)), :, anchors].unsqueeze(2)
