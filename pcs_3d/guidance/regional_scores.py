"""Uses different prompts and concepts for different parts of a view (locally conditioned diffusion,
https://arxiv.org/abs/2303.12218, eq. 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.guidance.scores import Adapters, Ask, Scores, Told
from pcs_3d.view_prompts import Views

_OWN: frozenset[Told] = frozenset({"prompt", "plain_prompt", "negative", "away_near", "away_far"})


class RegionalScores:
    """Scores of the whole scene, which are replaced by a region's own scores wherever a view shows that region
    (`Views.regions`).

    For the teacher's predictions with text prompts, eps = (1 - sum_r m_r) eps_whole + sum_r m_r eps_r, where m_r is the
    weight of region r. Regions that overlap share the weight. Unconditional predictions and those with other adapters
    than the teacher's always use the scores of the whole scene.

    Args:
        regions: maps each region's name to the same model's scores for that region's prompt and concepts
    """

    def __init__(self, whole: Scores, regions: Mapping[str, Scores]) -> None:
        self.whole, self.regions = whole, dict(regions)
        self.discrete_time = whole.discrete_time

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.whole.alpha_sigma(t)

    def eps(self, asks: Sequence[Ask], z_t: Tensor, t: Tensor, views: Views) -> list[Tensor]:
        found = dict(zip(asks, self.whole.eps(asks, z_t, t, views), strict=True))
        mine = [ask for ask in asks if ask.adapters == "teacher" and ask.told in _OWN]
        if mine and views.regions:
            mixed = {ask: found[ask] for ask in mine}
            for name, share in _shares(views.regions, z_t).items():
                if bool(share.any()):  # regions that no view shows are skipped
                    for ask, eps in zip(mine, self.regions[name].eps(mine, z_t, t, views), strict=True):
                        mixed[ask] = mixed[ask] + share * (eps - found[ask])
            found |= mixed
        return [found[ask] for ask in asks]

    def encode(self, pixels: Tensor) -> Tensor:
        return self.whole.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        return self.whole.decode(latents)

    def prediction_loss(self, ask: Ask, z: Tensor, noise: Tensor, t: Tensor, views: Views) -> Tensor:
        return self.whole.prediction_loss(ask, z, noise, t, views)

    def under(self, adapters: Adapters) -> AbstractContextManager[None]:
        return self.whole.under(adapters)


def _shares(regions: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Returns the weight of each region in each latent cell, `[B, 1, h, w]`. The weights in a cell sum to at most 1."""
    fitted = {name: F.interpolate(share.to(like), like.shape[-2:], mode="area") for name, share in regions.items()}
    total = torch.stack(list(fitted.values())).sum(0).clamp_min(1)
    return {name: share / total for name, share in fitted.items()}
