"""What can be known to be wrong before the first step."""

from __future__ import annotations

from collections.abc import Sequence

from shared.backbones.protocol import Backbone
from shared.config import unknown
from shared.prompts import expand
from shared.recipe.schema import MAIN, Recipe
from shared.sampling.sampler import check_guidance
from shared.sampling.schedulers import make_scheduler


def check_phases(backbone: Backbone, phases: Sequence[tuple[str, Recipe]], recipe: Recipe, scored: bool) -> None:
    """ValueError for what a run has once and a phase would have otherwise, and for pictures that cannot be made so."""
    for name, phase in phases:
        for slot, trainable in phase.trainable.items():
            if trainable.adapter_set in {*backbone.placeholders, *backbone.adapters}:
                raise ValueError(
                    f"trainable.{slot}.adapter_set = {trainable.adapter_set!r}: a loaded concept is called so; "
                    "choose another name"
                )
        if phase.train.mixed_precision != recipe.train.mixed_precision:
            raise ValueError(
                f"phases.{name}.train.mixed_precision = {phase.train.mixed_precision!r}: "
                "this is the same in all phases; say it outside of them (train.mixed_precision)"
            )
        if phase.task.needs_scores and not scored:
            raise ValueError(
                f"phases.{name}.task.keep chooses the best pictures by score, and nothing can score them here: "
                "give --clip FOLDER or --dino FOLDER, or leave keep out"
            )
    for place, part in (("", recipe), *((f"phases.{n}.", p) for n, p in phases)):
        check_guidance(part.sampling.guidance, f"{place}sampling.guidance")
        _check_optimizers(part, f"{place}train.optimizers")
        try:
            make_scheduler(backbone, part.sampling.scheduler)
        except ValueError as error:
            raise ValueError(f"{place}sampling.scheduler: {error}") from None


def _check_optimizers(recipe: Recipe, where: str) -> None:
    groups = {part.group for part in recipe.trainable.values()}
    for name in recipe.train.optimizers:
        if groups and name not in groups and name != MAIN:
            raise ValueError(f"{where}: {unknown(name, groups, 'group')} A part under trainable says its group.")


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
