"""Penalties on the opacity of views."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.regularize.base import GeometryPenalty, Seen


class Sparsity(GeometryPenalty):
    """The mean of √(o² + 0.01) over opacities o, which keeps the object from filling empty space (DreamFusion,
    https://arxiv.org/abs/2209.14988, A.2)."""

    kind: Literal["sparsity"] = "sparsity"

    def value(self, seen: Seen) -> Tensor:
        return (seen.rendering.opacity.square() + 0.01).sqrt().mean()


class Opaque(GeometryPenalty):
    """The mean entropy of opacities, −o log o − (1 − o) log (1 − o), which makes each pixel either opaque or empty
    (threestudio's `opaque`)."""

    kind: Literal["opaque"] = "opaque"

    def value(self, seen: Seen) -> Tensor:
        opacity = seen.rendering.opacity.clamp(1e-3, 1 - 1e-3)
        return F.binary_cross_entropy(opacity, opacity)


class ZVariance(GeometryPenalty):
    """The variance of depth along rays that hit something, averaged over these rays. Minimising it turns fog into
    surfaces (HiFA, https://arxiv.org/abs/2305.18766, eq. 9)."""

    kind: Literal["z_variance"] = "z_variance"

    def value(self, seen: Seen) -> Tensor:
        weights, distances = seen.rendering.weights, seen.rendering.distances
        if weights is None or distances is None:
            raise self.missing("a renderer that marches rays (renderer.kind=volume)")
        opacity = weights.sum(-1)
        share = weights / opacity.clamp_min(1e-6)[..., None]
        mean = (share * distances).sum(-1, keepdim=True)
        variance = (share * (distances - mean).square()).sum(-1)
        hit = (opacity.detach() > 0.5).to(variance)
        return (variance * hit).sum() / torch.clamp_min(hit.sum(), 1)
