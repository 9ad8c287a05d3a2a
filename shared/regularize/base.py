"""The base class of all penalties."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from shared.config import KindPart
from shared.types import Step


class Penalty(KindPart):
    """A scalar that is added to a step's loss."""

    needs: ClassVar[frozenset[str]] = frozenset()  # names of the values needed besides the prediction
    needs_class_examples: ClassVar[bool] = False  # whether batches must contain class pictures
    needs_masks: ClassVar[bool] = False  # whether the subjects' pictures must have masks

    @property
    def provides(self) -> Sequence[Any]:
        """The needs (`shared.train.needs.Need`) that the penalty itself provides."""
        return ()

    def __call__(self, step: Step) -> Tensor:
        raise NotImplementedError
