"""L-BFGS (Liu & Nocedal, 1989), suited to few parameters and a noise-free loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field

from shared.optimizers.base import OptimizerPart

Count = Annotated[int, Field(ge=1, le=1000)]


class Lbfgs(OptimizerPart):
    """torch's L-BFGS. It evaluates the loss up to `max_iter` * 1.25 times per step, always with the same noise.

    Gradients are not clipped, because the line search needs gradients that match the losses.
    """

    needs_closure: ClassVar[bool] = True
    kind: Literal["lbfgs"] = "lbfgs"
    weight_decay: Literal[0] = 0  # type: ignore[assignment]
    max_grad_norm: None = None
    max_iter: Count = 10
    history_size: Count = 10
    line_search: Literal["strong_wolfe"] | None = "strong_wolfe"

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        rates = sorted({group["lr"] for group in groups})
        if len(rates) > 1:
            raise ValueError(f"train.optimizers: lbfgs uses one rate for all parts, but their rates are {rates}")
        return torch.optim.LBFGS(
            [p for group in groups for p in group["params"]],
            lr=rates[0],
            max_iter=self.max_iter,
            history_size=self.history_size,
            line_search_fn=self.line_search,
        )
