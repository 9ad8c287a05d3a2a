"""What can be known to be wrong before the first step."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from shared.backbones.protocol import Backbone
from shared.prompts import expand
from shared.recipe.schema import Recipe
from shared.sampling.sampler import check_guidance
from shared.sampling.schedulers import make_scheduler


def check_phases(backbone: Backbone, phases: Sequence[tuple[str, Recipe]], recipe: Recipe) -> None:
    """ValueError for what a run has once and a phase would have otherwise, and for pictures that cannot be made so."""
    for name, phase in phases:
        if phase.train.mixed_precision != recipe.train.mixed_precision:
            raise ValueError(
                f"phases.{name}.train.mixed_precision = {phase.train.mixed_precision!r}: "
                "this is the same in all phases; say it outside of them (train.mixed_precision)"
            )
    for place, part in (("", recipe), *((f"phases.{n}.", p) for n, p in phases)):
        check_guidance(part.sampling.guidance, f"{place}sampling.guidance")
        try:
            make_scheduler(backbone, part.sampling.scheduler)
        except ValueError as error:
            raise ValueError(f"{place}sampling.scheduler: {error}") from None


def check_validation(backbone: Backbone, names: Sequence[str], phases: Sequence[tuple[str, Recipe]]) -> None:
    """ValueError for a validation prompt that does not name the concept, names another, or is too long.

    To be called when the names are attached: their tokens count.
    """
    for phase, recipe in phases:
        check = recipe.train.validation
        for prompt in check.prompts if check.every else ():
            where = f"train.validation.prompts (phase {phase})"
            if "{concept}" not in prompt:
                raise ValueError(f"{where}: {prompt!r} does not say {{concept}}, where the concept's name goes")
            for name in names:
                try:
                    backbone.check_prompt(expand(prompt.replace("{concept}", f"<{name}>"), backbone.placeholders))
                except ValueError as error:
                    raise ValueError(f"{where}: {prompt!r}: {error}") from None


def own_needs(part: object) -> frozenset[str]:
    """What a part says that it needs of a step."""
    return frozenset(getattr(part, "needs", frozenset()))


def check_needs(parts: Mapping[str, object], served: Collection[str]) -> frozenset[str]:
    """All that the parts (place in the recipe -> part) declare. ValueError for a need that nothing can serve."""
    for place, part in parts.items():
        missing = sorted(own_needs(part) - set(served))
        if missing:
            there = ", ".join(sorted(served))
            raise ValueError(f"{place} needs {missing[0]!r}, and nothing here can give it. There are: {there}.")
    return frozenset().union(*(own_needs(p) for p in parts.values()))
