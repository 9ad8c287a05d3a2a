"""Checks that find errors before the first step."""

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
    """Raises ValueError when a phase's settings conflict with the rest of the run or with loaded concepts.

    Also raises ValueError when sampling or optimizer settings cannot work.
    """
    for name, phase in phases:
        for slot, trainable in phase.trainable.items():
            if trainable.adapter_set in {*backbone.placeholders, *backbone.adapters}:
                raise ValueError(
                    f"trainable.{slot}.adapter_set = {trainable.adapter_set!r}: a loaded concept has this name; "
                    "choose another name"
                )
        if phase.train.mixed_precision != recipe.train.mixed_precision:
            raise ValueError(
                f"phases.{name}.train.mixed_precision = {phase.train.mixed_precision!r}: "
                "all phases share one precision; set it outside the phases (train.mixed_precision)"
            )
        if phase.attention != recipe.attention:
            raise ValueError(
                f"phases.{name}.attention: all phases share the same attention settings; set them outside the phases "
                "(attention)"
            )
        _check_off(f"phases.{name}.task.off" if recipe.phases else "task.off", phase, recipe)
        if phase.task.needs_scores and not scored:
            raise ValueError(
                f"phases.{name}.task.keep selects the best pictures by score, but nothing can score them here: "
                "give --clip FOLDER or --dino FOLDER, or leave out keep"
            )
    for place, part in (("", recipe), *((f"phases.{n}.", p) for n, p in phases)):
        check_guidance(part.sampling.guidance, f"{place}sampling.guidance")
        _check_optimizers(part, f"{place}train.optimizers")
        try:
            make_scheduler(backbone, part.sampling.scheduler)
        except ValueError as error:
            raise ValueError(f"{place}sampling.scheduler: {error}") from None


def _check_off(where: str, phase: Recipe, recipe: Recipe) -> None:
    """Raises ValueError when `task.off` lists an adapter set that no trainable part of the run uses."""
    sets = {part.adapter_set for _, p in expand_phases(recipe) for part in p.trainable.values() if part.adapter_set}
    for name in phase.task.off:
        if name not in sets:
            raise ValueError(
                f"{where}: {unknown(name, sets, 'adapter set')} To add one, set adapter_set in a part under trainable."
            )


def check_sources(phases: Sequence[tuple[str, Recipe]], subjects: Mapping[str, Subject]) -> None:
    """Raises ValueError when pictures to learn from are missing, or when they lack masks that a part needs."""
    earlier: list[str] = []
    for name, phase in phases:
        pictures: dict[Path, Path | None] = {}
        for key, source in phase.sources.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # warnings are shown when the pictures are read for training
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
    """Raises ValueError when a penalty needs masks but no picture of a subject has one."""
    for key, penalty in recipe.regularize.items():
        if penalty.needs_masks and not has_masks:
            raise ValueError(
                f"regularize.{key} needs masks, but no picture has one: put masks in masks/ next to the pictures (with "
                "the same file names), set subject.masks, or use pictures with a transparent background"
            )


def _check_optimizers(recipe: Recipe, where: str) -> None:
    groups = {part.group for part in recipe.trainable.values()} | recipe.task.optimizer_groups
    for name in recipe.train.optimizers:
        if groups and name not in groups and name != MAIN:
            raise ValueError(
                f"{where}: {unknown(name, groups, 'group')} To add one, set group in a part under trainable."
            )


def check_validation(backbone: Backbone, names: Sequence[str], phases: Sequence[tuple[str, Recipe]]) -> None:
    """Raises ValueError for a validation prompt that lacks {concept}, names an unknown concept, or is too long.

    Must be called after the names are attached, because their tokens count towards the length.
    """
    for phase, recipe in phases:
        check = recipe.train.validation
        for prompt in check.prompts if check.every else ():
            where = f"train.validation.prompts (phase {phase})"
            if "{concept}" not in prompt:
                raise ValueError(f"{where}: {prompt!r} has no {{concept}}, which marks where the concept's name goes")
            for name in names:
                try:
                    backbone.check_prompt(expand(prompt.replace("{concept}", f"<{name}>"), backbone.placeholders))
                except ValueError as error:
                    raise ValueError(f"{where}: {prompt!r}: {error}") from None
