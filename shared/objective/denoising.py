"""The denoising loss per example, computed against the backbone's own target."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.config import Part, Positive


class Denoising(Part):
    """Squared error between prediction and target (epsilon, v or flow velocity).

    `masked` restricts the loss to the subject: sum(m * e^2) / sum(m), so that a small subject counts as much as a large one;
    by default it is on whenever a picture has a mask. `outside` is the weight of the background; a value above 0 keeps the
    model from turning the background into noise. `inside` is the weight of the subject: inside=0 with outside=1 learns
    everything but the subject, such as a motion without its performer. `min_snr_gamma` is gamma in the weighting of
    https://arxiv.org/abs/2303.09556, eq. 4 to 6.
    """

    kind: Literal["denoising"] = "denoising"
    masked: bool | None = None  # null: on if there are masks; true: the same, but warns if there are none; false: off
    outside: Annotated[float, Field(ge=0, le=1)] = 0.0
    inside: Annotated[float, Field(ge=0, le=1)] = 1.0
    min_snr_gamma: Positive | None = None

    @model_validator(mode="after")
    def _something_counts(self) -> Denoising:
        if self.masked is not False and not self.inside and not self.outside:
            raise ValueError("inside = 0 and outside = 0: nothing would be learned; set one of them to 1")
        return self

    @property
    def inverts(self) -> bool:
        """Whether the loss weighs the masked area less than the rest."""
        return self.masked is not False and self.inside < self.outside

    def example_losses(self, prediction: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
        """Returns each example's mean squared error [B]; prediction and target: [B, C, h, w], weight: [B, 1, h, w] or None."""
        error = (prediction.float() - target.float()) ** 2
        if weight is None:
            return error.flatten(1).mean(1)
        weight = weight.float().expand_as(error)
        return (weight * error).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)

    def weight(self, mask: Tensor | None, valid: Tensor | None) -> Tensor | None:
        """Returns the per-pixel weight [B, 1, (f), h, w], or None if all pixels count equally.

        Args:
            mask: [B, 1, (f), h, w]; an example whose mask is 1 everywhere has no background, so its weight is 1 everywhere
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
        """Returns the weights [B]: min(SNR, gamma), converted to the model's parametrisation; 1 if `min_snr_gamma` is None."""
        if self.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        alpha, sigma = (x.float() for x in backbone.alpha_sigma(t))
        snr = (alpha / sigma.clamp_min(1e-8)) ** 2
        clipped = snr.clamp_max(self.min_snr_gamma)
        # the weight is defined for the loss on x_0; each parametrisation's error is the error in x_0 times a known factor
        return {"epsilon": clipped / snr.clamp_min(1e-8), "v_prediction": clipped / (snr + 1), "sample": clipped}.get(
            backbone.prediction_type,
            clipped * sigma**2,  # flow: |v - v'|^2 = |x_0 - x_0'|^2 / sigma^2
        )
