"""AdamW (https://arxiv.org/abs/1711.05101), in full precision or with 8-bit moments (https://arxiv.org/abs/2110.02861)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from shared.config import Positive
from shared.optimizers.base import Beta, OptimizerPart


class AdamW(OptimizerPart):
    """torch's AdamW."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # decay rates of the moving averages of gradients and their squares
    eps: Positive = 1e-8  # added to the denominator, for numerical stability

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        # The fused kernel is not used, because with it a resumed run would give different results. On a CPU, it
        # misreads moments whose strides differ from the parameter's, and rounds differently at the end of a tensor.
        return torch.optim.AdamW(list(groups), betas=self.betas, eps=self.eps)


class AdamW8bit(AdamW):
    """bitsandbytes' AdamW, whose 8-bit moments take a quarter of the memory of fp32 moments. It needs a GPU."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"  # type: ignore[assignment]

    def build(self, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
        if any(p.device.type == "cpu" for group in groups for p in group["params"]):
            raise ValueError("train.optimizers: adamw_8bit needs a GPU; on a CPU, use adamw, prodigy or schedule_free")
        try:
            from bitsandbytes.optim import AdamW8bit as Quantised  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ValueError("train.optimizers: adamw_8bit needs bitsandbytes (pip install bitsandbytes)") from None
        return Quantised(list(groups), betas=self.betas, eps=self.eps)
