"""Helpers that run score distillation on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pcs_3d.distill.distill import Distill
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.guidance.scores import Scores
from shared.recipe.resolve import load
from shared.train.training_run import TASKS, TrainingRun
from tests.three_d.picture_scenes import PictureRecipe

SMALL = ("backbone=tiny", "prompt=a photo of a mug", "train.steps=6", "train.batch_size=2", "train.resolution=32",
         "train.mixed_precision=no", "train.checkpoint_every=0")  # fmt: skip


def recipe(name: str, *settings: str) -> PictureRecipe:
    """Loads a shipped recipe and configures it to take a few steps on small pictures."""
    return load(name, [*SMALL, *settings], "3d", PictureRecipe)


def session(
    backbone: Any, how: PictureRecipe, folder: Path, scores: Scores | None = None, **changes: Any
) -> TrainingRun:
    """Returns a run of the recipe. If `scores` is given, it guides the run in place of the backbone."""

    def distill(context: Any) -> Distill:
        return Distill(context) if scores is None else Distill(context, lambda *_: scores)

    settings = {"tensorboard": False, "tasks": {**TASKS, DistillTask: distill}, **changes}
    return TrainingRun(backbone, how, settings.pop("subjects", {}), folder, folder.parent / "cache", **settings)


def finish(run: TrainingRun, resume: bool = False) -> dict[str, Tensor]:
    """Takes all remaining steps of a run. Returns the tensors of the field and the student."""
    for _ in run.steps(resume):
        pass
    student = {f"{a.slot}/{k}": v for a in run.backbone.adapters.get("student", []) for k, v in a.state_dict().items()}
    return {**run.carried, **student}
