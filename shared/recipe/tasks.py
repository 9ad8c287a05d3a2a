"""What a phase does, as a recipe says it: `task: tune`, or `task: {kind: generate, num: 16, keep: 4}`. The tasks themselves are
in `shared.train`; a package with further ones widens the union in its own recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from shared.config import NAME, Part, default_kind

Count = Annotated[int, Field(ge=1, le=100_000)]


class TuneTask(Part):
    """Learn from what the phase's sources give. off: adapter sets of this run that are off in this phase."""

    kind: Literal["tune"] = "tune"
    off: tuple[Annotated[str, Field(pattern=NAME)], ...] = ()

    @property
    def optimizer_groups(self) -> frozenset[str]:
        """Of what it trains besides the recipe's trainable parts."""
        return frozenset()

    @property
    def needs_scores(self) -> bool:
        """Whether something must score pictures for it."""
        return False

    def count(self, steps: int, subjects: int) -> int:
        """How many steps it takes, where the recipe says `train.steps` and there are so many subjects."""
        return steps


class GenerateTask(Part):
    """Make pictures with the concept as it is by now, into a folder that a later phase reads
    (`sources.NAME.kind=phase_pictures`)."""

    kind: Literal["generate"] = "generate"
    prompts: tuple[str, ...] = ("a photo of a {concept}",)
    num: Count = 8  # pictures per prompt and subject
    keep: Count | None = None  # of all pictures of a subject, the best so many by the scorers; None: all
    batch_size: Count = 4  # made at once
    off: tuple[Annotated[str, Field(pattern=NAME)], ...] = ()  # adapter sets of this run that are off in this phase

    @property
    def optimizer_groups(self) -> frozenset[str]:
        """Of what it trains besides the recipe's trainable parts."""
        return frozenset()

    @property
    def needs_scores(self) -> bool:
        """Whether something must score pictures for it."""
        return self.keep is not None

    def count(self, steps: int, subjects: int) -> int:
        """How many steps it takes: one for each batch of pictures."""
        return -(-self.num * len(self.prompts) * subjects // self.batch_size)

    @field_validator("prompts")
    @classmethod
    def _names_the_concept(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in prompts:
            if "{concept}" not in prompt:
                raise ValueError(f"the prompt {prompt!r} does not say {{concept}}, where the concept's name goes")
        return prompts


def named(value: Any) -> Any:
    """A task by its name alone: `task: tune`."""
    return {"kind": value} if isinstance(value, str) else value


TaskPart = Annotated[TuneTask | GenerateTask, Field(discriminator="kind"), default_kind("tune"), BeforeValidator(named)]
