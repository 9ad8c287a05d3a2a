"""The base class of all optimizer parts, with the settings of the rate schedule, of clipping and of the saved state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from shared.config import NotNegative, Part, Positive, Steps

Beta = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class OptimizerPart(Part):
    """Settings of one optimizer. Each trainable part has its own learning rate."""

    #: Entries of the optimizer's parameter groups that change while it runs, saved with its per-parameter state.
    progress: ClassVar[tuple[str, ...]] = ()
    averages: ClassVar[bool] = False  # whether the optimizer has `eval` and `train`, which switch to averages and back
    needs_closure: ClassVar[bool] = False  # whether it evaluates the loss itself, several times per step
    weight_decay: NotNegative = 1e-2  # pulls weights toward 0; a part's own setting takes precedence
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # how rates change after the warmup
    warmup: Steps = 0  # steps
    # final fraction of the run over which rates fall; less than 1 for warmup-stable-decay (arXiv 2404.06395)
    decay: Fraction = 1.0
    max_grad_norm: Positive | None = 1.0  # gradients are clipped to this norm; null for no clipping

    @model_validator(mode="after")
    def _something_falls(self) -> OptimizerPart:
        if self.schedule == "constant" and self.decay != 1:
            raise ValueError(f"decay = {self.decay} has no effect with schedule: constant; choose linear or cosine")
        return self

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Builds the optimizer for parameter groups with "params", "lr" and "weight_decay". Raises ValueError if it cannot be
        used, for example without a library or a GPU, or with unsuitable rates."""
        raise NotImplementedError

    def rate(self, lr: float, factor: float) -> float:
        """Returns the current rate of a part whose own rate is `lr`, at this factor of the schedule."""
        return lr * factor

    def factor(self, step: int, done: float) -> float:
        """Returns the factor by which the rates are multiplied.

        Args:
            step: the number of steps done. Rates rise linearly over the first `warmup` steps
            done: the fraction of the steps after the warm-up that are done, in [0, 1]
        """
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        fallen = min(1.0, max(0.0, (done - (1 - self.decay)) / self.decay))
        if self.schedule == "linear":
            return 1 - fallen
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * fallen))
        return 1.0
