"""Prodigy (https://arxiv.org/abs/2306.06101), an optimizer that estimates the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from shared.config import Positive
from shared.optimizers.base import Beta, OptimizerPart


class Prodigy(OptimizerPart):
    """prodigyopt's Prodigy. The estimated rate is multiplied by `lr`; the parts' own rates are ignored."""

    progress: ClassVar[tuple[str, ...]] = ("d", "d_max", "d_numerator", "d_denom", "d_hat", "k")
    kind: Literal["prodigy"] = "prodigy"
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    lr: Positive = 1.0
    d_coef: Positive = 1.0  # larger values give larger estimates of the rate
    safeguard_warmup: bool = True  # keeps the low rates of the warm-up from inflating the estimate

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        from prodigyopt import Prodigy as Optimizer

        rated = [{**group, "lr": self.lr} for group in groups]
        return Optimizer(
            rated, betas=self.betas, eps=self.eps, d_coef=self.d_coef, safeguard_warmup=self.safeguard_warmup
        )

    def rate(self, lr: float, factor: float) -> float:
        return self.lr * factor
