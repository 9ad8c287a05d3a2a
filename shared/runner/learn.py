"""Learns the concepts of a plan and saves them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.concept import save
from shared.io.contact_sheets import contact_sheet, stills
from shared.io.denoising_progress import named
from shared.io.failures import in_words
from shared.io.locks import hold, holding
from shared.recipe.phases import expand_phases
from shared.recipe.schema import Recipe
from shared.runner.base import Progress, Runner
from shared.runner.plan import Plan, warn_unseen
from shared.train import checkpoint
from shared.types import Subject


@holding()
def personalize(
    planned: Plan,
    runner: Runner,
    *,
    resume: bool = False,
    overwrite: bool = False,
    scorers: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Learns and saves the concepts. Returns their folders by name.

    The training folder keeps the logs and samples, but not the checkpoints. If `resume` is not set, files that an
    earlier run left in this folder are removed when the first step begins. An interrupted run can be resumed until
    every concept has been saved with its preview. Raises ValueError if another process is writing to one of the folders.
    """
    if planned.finished:
        return dict(planned.outputs)
    for path in (*planned.outputs.values(), planned.workdir):
        hold(path)
    recipe = planned.recipe
    warn_unseen(runner.backbone, planned.subjects)
    side = preview_resolution(runner, recipe)
    if recipe.preview.num:
        runner.backbone.latent_shape(side, side)  # report an invalid size now
    concepts = runner.personalize(
        planned.subjects,
        recipe,
        planned.workdir,
        resume=resume,
        scorers=scorers,
        progress=progress,
    )
    for name, concept in concepts.items():
        planned.outputs[name].parent.mkdir(parents=True, exist_ok=True)
        picture = _painted(runner, name, planned.subjects[name], recipe, progress)
        saved = save(concept, planned.outputs[name], overwrite=overwrite or resume, preview=picture)
        runner.loaded[name] = replace(runner.loaded[name], concept=saved)
    checkpoint.drop(planned.workdir)
    return dict(planned.outputs)


def _painted(runner: Runner, name: str, subject: Subject, recipe: Recipe, progress: Progress | None) -> Any:
    """Returns the preview, or None if it is not requested or cannot be generated. A concept is valid without one."""
    if not recipe.preview.num:
        return None
    try:
        return preview(runner, name, subject, recipe, progress)
    except Exception as error:  # the concept must be saved even if the preview fails, for example for lack of memory
        why = in_words(error) or (str(error).splitlines()[0] if str(error) else type(error).__name__)
        warnings.warn(f"the preview of {name!r} could not be generated and is left out ({why})", stacklevel=2)
        return None


def preview_resolution(runner: Runner, recipe: Recipe) -> int:
    """Returns the side length of the preview's pictures, in pixels."""
    *_, (_, last) = expand_phases(recipe)
    return recipe.preview.resolution or last.train.resolution or runner.backbone.resolution


def preview(runner: Runner, name: str, subject: Subject, recipe: Recipe, progress: Progress | None = None) -> Any:
    """Generates the concept's `preview.png`, with a row of references above a row of new pictures."""
    *_, (_, last) = expand_phases(recipe)
    side, num, how = preview_resolution(runner, recipe), recipe.preview.num, last.sampling
    settings = replace(how.settings(), steps=recipe.preview.steps or how.steps, height=side, width=side)
    on_progress = named(progress.pictures if progress else None, f"the preview of {name!r}")
    prompts = [recipe.preview.prompt.replace("{concept}", f"<{name}>")] * num
    pixels = runner.generate(prompts, range(num), settings, must_name=False, progress=on_progress)
    first = replace(subject, images=subject.images[:num], clips=subject.clips[:num])
    return contact_sheet({"references": runner.shown(first, side), "new": stills(pixels)})
