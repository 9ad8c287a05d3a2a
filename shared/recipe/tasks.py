"""The settings of a phase's task, such as `task: tune` or `task: {kind: generate, num: 16, keep: 4}`. The tasks are
implemented in `shared.train`. A package that has more tasks extends `TaskPart` in its own recipe class."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from shared.config import NAME, Part, default_kind

Count = Annotated[int, Field(ge=1, le=100_000)]


class TuneTask(Part):
    """Learns the subject from the phase's sources."""

    kind: Literal["tune"] = "tune"
    off: tuple[Annotated[str, Field(pattern=NAME)], ...] = ()  # adapter sets of this run that are off in this phase

    @property
    def optimizer_groups(self) -> frozenset[str]:
        """The optimizer groups of anything that the task trains besides the recipe's trainable parts."""
        return frozenset()

    @property
    def needs_scores(self) -> bool:
        """Whether the task needs scores of the pictures that it generates."""
        return False

    @property
    def learns_subjects(self) -> bool:
        """Whether the task learns the subjects. If no task does, the subjects' pictures serve only for comparison."""
        return True

    def count(self, steps: int, subjects: int) -> int:
        """Returns the number of steps, given `train.steps` and the number of subjects."""
        return steps


class GenerateTask(Part):
    """Generates pictures with the concept learned so far, and saves them in a folder that a later phase reads
    (`sources.NAME.kind=phase_pictures`)."""

    kind: Literal["generate"] = "generate"
    prompts: tuple[str, ...] = ("a photo of a {concept}",)
    num: Count = 8  # pictures per prompt and subject
    keep: Count | None = None  # number of pictures to keep per subject, best scores first; null: all
    batch_size: Count = 4  # pictures generated together
    off: tuple[Annotated[str, Field(pattern=NAME)], ...] = ()  # adapter sets of this run that are off in this phase

    @property
    def optimizer_groups(self) -> frozenset[str]:
        """The optimizer groups of anything that the task trains besides the recipe's trainable parts."""
        return frozenset()

    @property
    def needs_scores(self) -> bool:
        """Whether the task needs scores of the pictures that it generates."""
        return self.keep is not None

    @property
    def learns_subjects(self) -> bool:
        """Always False, because the task only uses what has already been learned."""
        return False

    def count(self, steps: int, subjects: int) -> int:
        """Returns the number of steps, one per batch of pictures."""
        return -(-self.num * len(self.prompts) * subjects // self.batch_size)

    @field_validator("prompts")
    @classmethod
    def _names_the_concept(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if "{concept}" not in prompt:
                raise ValueError(f"the prompt {prompt!r} has no {{concept}}, which marks where the concept's name goes")
        return prompts


def named(value: Any) -> Any:
    """Converts a task given only by its name, as in `task: tune`, to settings. Returns other values unchanged."""
    return {"kind": value} if isinstance(value, str) else value


TaskPart = Annotated[TuneTask | GenerateTask, Field(discriminator="kind"), default_kind("tune"), BeforeValidator(named)]
