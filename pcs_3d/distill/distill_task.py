"""Score distillation: its settings in a recipe."""

from __future__ import annotations

from typing import Literal

from shared.recipe.tasks import TuneTask
from shared.trainable.base import MAIN


class DistillTask(TuneTask):
    """Optimises an asset: `train.steps` steps on `train.batch_size` views of `train.resolution` pixels each."""

    kind: Literal["distill"] = "distill"  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def optimizer_groups(self) -> frozenset[str]:
        """Only the group of the field."""
        return frozenset({MAIN})

    @property
    def learns_subjects(self) -> bool:
        """False: it learns a field."""
        return False
