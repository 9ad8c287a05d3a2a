"""What can be known to be wrong before the first step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from shared.backbones.protocol import Backbone
from shared.config import unknown
from shared.io.read_subject import transparent
from shared.masks import no_mask
from shared.prompts import expand
from shared.recipe.phases import expand_phases
from shared.recipe.schema import MAIN, Recipe
from shared.sampling.sampler import check_guidance
from shared.sampling.schedulers import make_scheduler
from shared.types import Subject


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
        if phase.attention != recipe.attention:
            raise ValueError(
                f"phases.{name}.attention: this is the same in all phases; say it outside of them (attention)"
            )
        _check_off(f"phases.{name}.task.off" if recipe.phases else "task.off", phase, recipe)
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


def _check_off(where: str, phase: Recipe, recipe: Recipe) -> None:
    """ValueError for adapter sets that are to be off and that no part of the run is in."""
    sets = {part.adapter_set for _, p in expand_phases(recipe) for part in p.trainable.values() if part.adapter_set}
    for name in phase.task.off:
        if name not in sets:
            raise ValueError(
                f"{where}: {unknown(name, sets, 'adapter set')} A part under trainable says its adapter_set."
            )


def check_sources(phases: Sequence[tuple[str, Recipe]], subjects: Mapping[str, Subject]) -> None:
    """ValueError for pictures to learn from that are not there, and for masks that a part needs and they have not."""
    earlier: list[str] = []
    for name, phase in phases:
        pictures: dict[Path, Path | None] = {}
        for key, source in phase.sources.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # said when they are read to be learned from
                    pictures |= source.check(subjects, earlier)
            except ValueError as error:
                raise ValueError(f"sources.{key}: {error}") from None
        needed = any(part.needs_masks for part in (*phase.masks.values(), *phase.regularize.values()))
        bare = [p for p, mask in pictures.items() if mask is None and not transparent(p)] if needed else []
        if bare and any(part.needs_masks for part in phase.masks.values()):
            raise ValueError(no_mask(bare[0]))
        if pictures:
            check_masks(phase, len(bare) < len(pictures))
        earlier.append(name)


def check_masks(recipe: Recipe, has_masks: bool) -> None:
    """ValueError for a penalty on masks where no picture of a subject has one."""
    for key, penalty in recipe.regularize.items():
        if penalty.needs_masks and not has_masks:
            raise ValueError(
                f"regularize.{key} keeps words on masks, and no picture has one: put them in masks/ beside the pictures, "
                "with the same names, say where they are with subject.masks, or give pictures with a transparent background"
            )


def _check_optimizers(recipe: Recipe, where: str) -> None:
    groups = {part.group for part in recipe.trainable.values()} | recipe.task.optimizer_groups
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
