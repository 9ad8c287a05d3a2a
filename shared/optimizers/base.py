"""What every optimizer part has in common: how rates change over a run, clipping, and what is saved of its progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from shared.config import Part

Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class OptimizerPart(Part):
    """Settings of one optimizer; each trainable part brings its own rate."""

    #: Entries of the optimizer's parameter groups that change while it runs, saved beside its per-parameter state.
    progress: ClassVar[tuple[str, ...]] = ()
    needs_closure: ClassVar[bool] = False  # evaluates the loss itself, several times per step
    weight_decay: NotNegative = 1e-2
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0  # steps
    max_grad_norm: Positive | None = 1.0

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over parameter groups with "params", "lr" and "weight_decay". ValueError where it is missing."""
        raise NotImplementedError

    def rate(self, lr: float, factor: float) -> float:
        """The rate of a part whose own is `lr`, at this factor of the schedule."""
        return lr * factor

    def factor(self, step: int, done: float) -> float:
        """The factor on the rates.

        Args:
            step: steps done; rates rise linearly over `warmup` of them
            done: the spent fraction of what comes after the warm-up, in [0, 1]
        """
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if self.schedule == "linear":
            return 1 - done
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return 1.0
