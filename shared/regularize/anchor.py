"""Keeps learned token vectors close to their initial values."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from shared.config import NotNegative
from shared.regularize.base import Penalty
from shared.types import Step


class EmbeddingAnchor(Penalty):
    """Adds to the loss `weight` times the mean squared distance between the token vectors and their initial values
    (Cross Initialization, https://arxiv.org/abs/2312.15905, eq. 6). Token vectors that stay close to those of ordinary
    words combine better with the rest of a prompt."""

    needs: ClassVar[frozenset[str]] = frozenset({"token_drift"})
    kind: Literal["embedding_anchor"] = "embedding_anchor"
    weight: NotNegative = 1e-5

    def __call__(self, step: Step) -> Tensor:
        return self.weight * step.need("token_drift").mean()  # squared distances [n]
