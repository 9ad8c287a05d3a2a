"""Implements Perp-Neg (https://arxiv.org/abs/2304.04968). It uses the prompts for other views as negatives, but removes
the component of each negative prediction that is parallel to the prediction for the current view's prompt."""

from __future__ import annotations

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pcs_3d.cameras import Cameras, wrapped_deg
from pcs_3d.view_prompts import Direction, Mix, ScenePrompts, Views
from shared.config import Part, Real

Coefficient = Annotated[float, Field(ge=-100, le=100)]  # a, b or c in a exp(-b r) + c
Curve = tuple[Coefficient, Coefficient, Coefficient]


class PerpNeg(Part):
    """Perp-Neg. The prompt embedding is interpolated between the embeddings of two view prompts according to the
    azimuth. The prompts for other views serve as negatives.

    eps = eps_0 + s (e_pos + sum_i w_i perp(e_i, e_pos)) with e = eps - eps_0 (sections 3.2 and 4.2), where s is the
    total coefficient of the prompt's terms. The weights w_i are -(a exp(-b r) + c), where r in [0, 1] is the camera's
    position between two views. The default values of a, b and c are threestudio's. `strength` scales all weights. Views
    from above have no negatives.
    """

    side_back: Curve = (1.0, 0.5, -0.606)  # a, b, c for the negative "side" between the side and the back
    front_side_back: Curve = (1.0, 0.5, 0.967)  # a, b, c for the negative "front" between the side and the back
    front_side: Curve = (4.0, 0.5, -2.426)  # a, b, c for the negative "front" between the front and the side
    side_front: Curve = (4.0, 0.5, -2.426)  # a, b, c for the negative "side" between the front and the side
    strength: Real = 1.0

    def rows(self, told: str, prompts: ScenePrompts, views: Views) -> list[Mix]:
        """Returns the mix of texts for each view, where `told` is "prompt", "away_near" or "away_far". For cameras in
        front of the object, the near negative is "front" and the far negative is "side". For cameras behind the object,
        the two are swapped."""
        return [
            self._row(told, prompts, direction, around, nameless)
            for direction, around, nameless in zip(
                prompts.words.directions(views.cameras), _around(views.cameras), views.nameless, strict=True
            )
        ]

    def _row(self, told: str, prompts: ScenePrompts, direction: Direction, around: float, nameless: bool) -> Mix:
        def text(of: Direction) -> str:
            return prompts.text(of, nameless)

        front_half = around < 1
        r = 1 - around if front_half else 2 - around
        if direction == "overhead":
            return ((1.0, text("overhead")),)
        if told == "prompt":
            first, second = ("front", "side") if front_half else ("side", "back")
            return ((r, text(first)), (1 - r, text(second)))  # type: ignore[arg-type]
        near, far = ("front", "side") if front_half else ("side", "front")
        return ((1.0, text(near if told == "away_near" else far)),)  # type: ignore[arg-type]

    def weights(self, prompts: ScenePrompts, cameras: Cameras) -> Tensor:
        """Returns the weights of the near and far negatives, `[B, 2]`. They are never positive."""
        rows = []
        for direction, around in zip(prompts.words.directions(cameras), _around(cameras), strict=True):
            r = 1 - around if around < 1 else 2 - around
            pair = (
                (_at(self.front_side, r), _at(self.side_front, 1 - r))
                if around < 1
                else (_at(self.side_back, r), _at(self.front_side_back, r))
            )
            rows.append((0.0, 0.0) if direction == "overhead" else tuple(-self.strength * max(0.0, w) for w in pair))
        return torch.tensor(rows)


def perpendicular(e: Tensor, to: Tensor) -> Tensor:
    """Returns the component of `e` (`[B, ...]`) that is perpendicular to `to`, for each view separately."""
    flat, other = e.flatten(1), to.flatten(1)
    share = (flat * other).sum(1) / other.square().sum(1).clamp_min(torch.finfo(e.dtype).tiny)
    return e - share.reshape(-1, *([1] * (e.ndim - 1))) * to


def _around(cameras: Cameras) -> list[float]:
    """Returns how far around the object each camera is: 0 at the front, 1 at a side, and 2 at the back."""
    return (wrapped_deg(cameras.azimuth_deg).abs() / 90).tolist()


def _at(curve: Curve, r: float) -> float:
    a, b, c = curve
    return a * math.exp(-b * r) + c
