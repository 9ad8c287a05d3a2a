"""Schedule-free AdamW (https://arxiv.org/abs/2405.15682), which averages the iterates instead of lowering the rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch

from shared.config import Positive
from shared.optimizers.base import Beta, OptimizerPart


class ScheduleFree(OptimizerPart):
    """schedulefree's AdamW. Previews, scores and the saved concept use the averaged weights. `schedule` must be
    constant."""

    progress: ClassVar[tuple[str, ...]] = ("k", "weight_sum", "lr_max", "scheduled_lr", "train_mode")
    averages: ClassVar[bool] = True
    kind: Literal["schedule_free"] = "schedule_free"
    schedule: Literal["constant"] = "constant"  # type: ignore[assignment]
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Positive = 1e-8

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        from schedulefree import AdamWScheduleFree

        return AdamWScheduleFree(list(groups), betas=self.betas, eps=self.eps)
