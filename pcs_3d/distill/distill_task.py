"""The settings of score distillation in a recipe."""

from __future__ import annotations

from typing import Literal

from shared.recipe.tasks import TuneTask
from shared.trainable.base import MAIN


class DistillTask(TuneTask):
    """Optimises an asset for `train.steps` steps, each with `train.batch_size` views of `train.resolution` pixels per
    side."""

    kind: Literal["distill"] = "distill"  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def optimizer_groups(self) -> frozenset[str]:
        """The optimizer groups of the phase, which has only the group of the field."""
        return frozenset({MAIN})

    @property
    def learns_subjects(self) -> bool:
        """Always False, because the phase learns a field."""
        return False
