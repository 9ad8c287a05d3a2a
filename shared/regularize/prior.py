"""Preserves the model's knowledge of a class while it learns one member of that class."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from shared.config import NotNegative
from shared.regularize.base import Penalty
from shared.types import Step


class PriorPreservation(Penalty):
    """The denoising loss on class pictures (DreamBooth, https://arxiv.org/abs/2208.12242, eq. 2).

    It needs a source of class pictures, such as `sources.class_pictures.kind=generated`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"example_loss"})
    needs_class_examples: ClassVar[bool] = True
    kind: Literal["prior_preservation"] = "prior_preservation"
    weight: NotNegative = 1.0  # multiplies the penalty

    def __call__(self, step: Step) -> Tensor:
        is_prior = step.batch.with_role("prior").to(step.prediction.device)
        assert is_prior.any(), "the batch contains no class pictures"
        return self.weight * step.need("example_loss")[is_prior].mean()


class PriorPrediction(Penalty):
    """Keeps the prediction for the class prompt, on the same noisy latents, close to the base model's.

    The penalty is |eps_adapted(x_t, c_class) - eps_base(x_t, c_class)|^2, which needs no class pictures. Concepts that
    were loaded before the run count as part of the base model. Only the adapters of the concepts that are being trained
    are switched off.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"class_prediction", "base_class_prediction"})
    kind: Literal["prior_prediction"] = "prior_prediction"
    weight: NotNegative = 1.0  # multiplies the penalty

    def __call__(self, step: Step) -> Tensor:
        difference = step.need("class_prediction").float() - step.need("base_class_prediction").detach().float()
        return self.weight * (difference**2).mean()
