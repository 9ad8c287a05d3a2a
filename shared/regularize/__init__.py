"""Penalties that are added to the loss. To define a new penalty, write a module and add its class to the union."""

from typing import Annotated

from pydantic import Field

from shared.regularize.anchor import EmbeddingAnchor
from shared.regularize.localisation import Localisation
from shared.regularize.prior import PriorPrediction, PriorPreservation

Regularizer = Annotated[
    PriorPreservation | PriorPrediction | EmbeddingAnchor | Localisation, Field(discriminator="kind")
]

__all__ = ["EmbeddingAnchor", "Localisation", "PriorPrediction", "PriorPreservation", "Regularizer"]
