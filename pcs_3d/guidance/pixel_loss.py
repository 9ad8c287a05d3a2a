"""The pixel loss, which is added to the loss on latents (HiFA, https://arxiv.org/abs/2305.18766, eq. 8)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.guidance.engine import Guided, surrogate, time_weight
from pcs_3d.guidance.scores import Scores, coefficients
from pcs_3d.guidance.settings import Guidance


def pixel_loss(settings: Guidance, scores: Scores, guided: Guided, pixels: Tensor) -> Tensor:
    """Returns a scalar whose gradient with respect to the views x (`pixels`, `[B, 3, H, W]` in [0, 1]) is
    w(t) (alpha / sigma) (x - D(x0)) / B (see `surrogate`)."""
    with torch.no_grad():
        decoded = scores.decode(guided.x0).to(pixels)
        if decoded.shape[-2:] != pixels.shape[-2:]:  # decoded pictures have the model's resolution
            decoded = F.interpolate(decoded, pixels.shape[-2:], mode="bilinear", antialias=True)
        alpha, sigma = coefficients(scores, guided.noised.t, pixels)
        weight = time_weight(settings, scores, guided.noised.t, pixels) * alpha / sigma
        grad = weight * (pixels - decoded.clamp(0, 1))
        if settings.normalize == "mean":
            grad = grad / pixels[0].numel()
    return surrogate(pixels, grad)
