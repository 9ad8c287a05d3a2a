"""Penalties. A new penalty is one file and one line in the union."""

from typing import Annotated

from pydantic import Field

from shared.regularize.anchor import EmbeddingAnchor
from shared.regularize.prior import PriorPrediction, PriorPreservation

Regularizer = Annotated[PriorPreservation | PriorPrediction | EmbeddingAnchor, Field(discriminator="kind")]

__all__ = ["EmbeddingAnchor", "PriorPrediction", "PriorPreservation", "Regularizer"]
