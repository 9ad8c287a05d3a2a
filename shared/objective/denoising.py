"""Computes the denoising loss of each example against the target that the backbone defines."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import Part, Positive


class Denoising(Part):
    """The squared error between the prediction and the target (noise, clean latents, v or flow velocity).

    `masked` restricts the loss to the subject. The loss becomes sum(m * e^2) / sum(m), so that a small subject counts
    as much as a large one. By default, the loss is masked whenever a picture has a mask. `outside` is the weight of the
    background; a value above 0 keeps the model from turning the background into noise. `inside` is the weight of the
    subject. With inside=0 and outside=1, the model learns everything but the subject, such as a motion without its
    performer. `min_snr_gamma` is gamma in the weighting of https://arxiv.org/abs/2303.09556, eqs. 4 to 6.
    """

    kind: Literal["denoising"] = "denoising"
    # null masks the loss wherever there are masks; true also warns if there are none; false never masks the loss
    masked: bool | None = None
    outside: Annotated[float, Field(ge=0, le=1)] = 0.0
    inside: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_snr_gamma: Positive | None = None

    @model_validator(mode="after")
    def _something_counts(self) -> Denoising:
        if self.masked is not False and not self.inside and not self.outside:
            raise ValueError("nothing would be learned with inside = 0 and outside = 0; set one of them to 1")
        return self

    @property
    def inverts(self) -> bool:
        """Whether the masked area has a lower weight in the loss than the rest of the picture."""
        return self.masked is not False and self.inside < self.outside

    def example_losses(self, prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Returns the weighted mean squared error of each example ([B]). `prediction` and `target` are [B, C, (f), h, w], and
        `weight` is [B, 1, (f), h, w] or None."""
        error = (prediction.float() - target.float()) ** 2
        if weight is None:
            return error.flatten(1).mean(1)
        weight = weight.float().expand_as(error)
        return (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)

    def weight(self, mask: Tensor | None, valid: Tensor | None) -> Tensor | None:
        """Returns the per-pixel weight [B, 1, (f), h, w], or None if all pixels count equally.

        Args:
            mask: [B, 1, (f), h, w]. An example whose mask is 1 everywhere has no background, so its weight is 1 everywhere
            valid: [B, 1, (f), h, w], 0 at padding
        """
        weight = None
        if self.masked is not False and mask is not None:
            weight = self.outside + (self.inside - self.outside) * mask
            weight = torch.where(mask.flatten(1).amin(1).view(-1, *[1] * (mask.ndim - 1)) >= 1, 1.0, weight)
        if valid is not None:
            weight = valid if weight is None else weight * valid
        return weight

    def time_weight(self, backbone: Backbone, t: Tensor) -> Tensor:
        """Returns the weights min(SNR, gamma) at the times `t` ([B]), converted to the model's parametrisation. The
        weights are 1 if `min_snr_gamma` is None."""
        if self.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        alpha, sigma = (x.float() for x in backbone.alpha_sigma(t))
        snr = (alpha / sigma.clamp_min(1e-8)) ** 2
        clipped = snr.clamp_max(self.min_snr_gamma)
        # The weight is defined for the error in x_0. The error in every other parametrisation is proportional to it.
        return {"epsilon": clipped / snr.clamp_min(1e-8), "v_prediction": clipped / (snr + 1), "sample": clipped}.get(
            backbone.prediction_type,
            clipped * sigma**2,  # flow: |v - v'|^2 = |x_0 - x_0'|^2 / sigma^2
        )
