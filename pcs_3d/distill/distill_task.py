"""The settings of score distillation in a recipe."""

from __future__ import annotations

from typing import Literal

from shared.recipe.tasks import TuneTask
from shared.trainable.base import MAIN


class DistillTask(TuneTask):
    """Optimizes an asset for `train.steps` steps, each with `train.batch_size` views of `train.resolution` pixels per
    side."""

    kind: Literal["distill"] = "distill"  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def optimizer_groups(self) -> frozenset[str]:
        """The phase's only optimizer group, which is the field's."""
        return frozenset({MAIN})

    @property
    def learns_subjects(self) -> bool:
        """Always False, because the phase learns a field."""
        return False
