"""The base class of all optimizer parts. It defines the settings of the rate schedule and of gradient clipping."""

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

    #: Entries of the optimizer's parameter groups that change during a run and are saved with its per-parameter state.
    progress: ClassVar[tuple[str, ...]] = ()
    # whether the optimizer has the methods `eval` and `train`, which switch to averaged weights and back
    averages: ClassVar[bool] = False
    needs_closure: ClassVar[bool] = False  # whether it evaluates the loss itself, several times per step
    weight_decay: NotNegative = 1e-2  # pulls weights toward 0; a part's own setting takes precedence
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # how rates change after the warm-up
    warmup: Steps = 0  # number of steps over which rates rise linearly at the start
    # final fraction of the run over which rates fall; less than 1 for warmup-stable-decay (arXiv 2404.06395)
    decay: Fraction = 1.0
    max_grad_norm: Positive | None = 1.0  # gradients are clipped to this norm; null for no clipping

    @model_validator(mode="after")
    def _something_falls(self) -> OptimizerPart:
        if self.schedule == "constant" and self.decay != 1:
            raise ValueError(f"decay = {self.decay} has no effect with a constant schedule; choose linear or cosine")
        return self

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """Builds the optimizer for parameter groups with "params", "lr" and "weight_decay". Raises ValueError if the
        optimizer cannot be used, for example because a library or a GPU is missing, or because the rates are
        unsuitable."""
        raise NotImplementedError

    def rate(self, lr: float, factor: float) -> float:
        """Returns the current rate of a part whose own rate is `lr`, given the schedule's current factor."""
        return lr * factor

    def factor(self, step: int, done: float) -> float:
        """Returns the factor by which the rates are multiplied.

        Args:
            step: the number of completed steps. Rates rise linearly over the first `warmup` steps
            done: the completed fraction of the run after the warm-up, in [0, 1]
        """
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        fallen = min(1.0, max(0.0, (done - (1 - self.decay)) / self.decay))
        if self.schedule == "linear":
            return 1 - fallen
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * fallen))
        return 1.0
