"""Lowers a LoRA's rank as the noise increases (T-LoRA, https://arxiv.org/abs/2507.05964)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.backbones.protocol import Backbone

_T = 1000  # number of timesteps in the model's training schedule


def rank_at(t: Tensor, rank: int, min_rank: int) -> Tensor:
    """Returns how many of `rank` directions are active at the times t ([B]), as int64.

    This number is r(t) = floor((r - r_min) (T - t) / T) + r_min.
    """
    return ((rank - min_rank) * (_T - t.double()) / _T).floor().long() + min_rank


class RankByNoise:
    """A hook on a LoRA's first matrix that sets all but the first r(t) values of the output to 0.

    In the current prediction, each picture in the batch has its own time. Some layers have several rows per picture
    (for frames or positions); the picture's time then applies to all of these rows. The hook adds no parameters, and
    does not change the model's repr or state dict.
    """

    def __init__(self, backbone: Backbone, min_rank: int) -> None:
        self.backbone, self.min_rank = backbone, min_rank

    def common(self, rank: int) -> int | None:
        """Returns r(t) for this rank if it is the same for all pictures of the current prediction, otherwise None."""
        t = self.backbone.prediction_time
        if t is None:
            return None
        ranks = set(rank_at(t, rank, self.min_rank).tolist())
        return ranks.pop() if len(ranks) == 1 else None

    def __call__(self, module: Any, _args: Any, out: Tensor) -> Tensor:
        """Masks the output of a linear layer ([B * n, …, r]) or of a convolution ([B * n, r, …])."""
        t = self.backbone.prediction_time
        assert t is not None, "a noise-dependent rank is known only inside backbone.predict"
        linear = isinstance(module, nn.Linear)
        rank = out.shape[-1] if linear else out.shape[1]
        acting = torch.arange(rank, device=out.device) < rank_at(t, rank, self.min_rank).to(out.device)[:, None]
        assert len(out) % len(acting) == 0, f"{len(out)} rows are not a multiple of {len(acting)} pictures"
        acting = acting.repeat_interleave(len(out) // len(acting), 0).to(out.dtype)
        shape = [len(out), *[1] * (out.ndim - 2), rank] if linear else [len(out), rank, *[1] * (out.ndim - 2)]
        return out * acting.view(shape)
