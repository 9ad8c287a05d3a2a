"""Alternates between learning the subject and preserving its class, for examples that cannot share a batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from shared.config import NAME, unknown
from shared.recipe.tasks import TuneTask
from shared.train.phase_context import PhaseContext
from shared.train.task import Updates
from shared.train.tune import Tune


class AlternateTask(TuneTask):
    """Alternates between two kinds of steps. Every `every`-th step is a preservation step, which learns from class
    examples through the penalties that need them. All other steps learn from the subject, with all other losses. A
    single phase can therefore learn from both pictures of a subject and clips that preserve motion, as in MotionBooth
    (https://arxiv.org/abs/2406.17758).

    `rest` lists adapter sets that are off during preservation steps, such as Still-Moving's adapter for frozen clips.
    `subject_only` lists optimizer groups that learn only from the subject, such as that of a motion's words in SynMotion
    (https://arxiv.org/abs/2506.23690).
    """

    kind: Literal["alternate"] = "alternate"  # pyright: ignore[reportIncompatibleVariableOverride]
    every: Annotated[int, Field(ge=2, le=10_000)] = 2
    rest: tuple[Annotated[str, Field(pattern=NAME)], ...] = ()
    subject_only: tuple[Annotated[str, Field(pattern=NAME)], ...] = ()


class Alternate(Tune):
    """Runs an `AlternateTask`. Raises ValueError if no penalty needs class examples, if an adapter set or a group is unknown,
    or if nothing is left to learn in preservation steps."""

    def __init__(self, context: PhaseContext) -> None:
        super().__init__(context)
        task: Any = self.recipe.task
        self.task: AlternateTask = task
        if not self.data.with_priors:
            raise ValueError(
                "task.kind=alternate: no penalty needs class examples; add regularize.prior.kind=prior_preservation"
            )
        sets = [name for name in context.adapter_sets if name in self.backbone.adapters]
        missing = next((name for name in task.rest if name not in sets), None)
        if missing is not None:
            raise ValueError(f"task.rest: {unknown(missing, sets, 'adapter set')}")
        groups = self.groups()
        missing = next((name for name in task.subject_only if name not in groups), None)
        if missing is not None:
            raise ValueError(f"task.subject_only: {unknown(missing, groups, 'optimizer group')}")
        self.preserving = tuple(name for name in groups if name not in task.subject_only)
        if not self.preserving:
            raise ValueError(
                f"task.subject_only = {list(task.subject_only)} leaves no optimizer group that could learn from "
                "class examples"
            )

    def updates(self, step: int, micro: int) -> Updates:
        """Yields one loss, on class examples or on the subject."""
        preserves = step % self.task.every == self.task.every - 1
        batch = self.data.batch(step, micro, "prior" if preserves else "instance")
        if preserves:
            yield from self.of_one_role(step, micro, batch, resting=self.task.rest, groups=self.preserving)
        else:
            yield from self.of_one_role(step, micro, batch)
