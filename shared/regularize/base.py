"""The base class of all penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from shared.config import KindPart
from shared.types import Step


class Penalty(KindPart):
    """A scalar added to the loss of a step."""

    needs: ClassVar[frozenset[str]] = frozenset()  # names of the quantities it needs from a step besides the prediction
    needs_class_examples: ClassVar[bool] = False  # whether batches must contain class pictures
    needs_masks: ClassVar[bool] = False  # whether the subjects' pictures must have masks

    @property
    def provides(self) -> Sequence[Any]:
        """Returns the needs (`shared.train.needs.Need`) that it provides itself."""
        return ()

    def __call__(self, step: Step) -> Tensor:
        raise NotImplementedError
