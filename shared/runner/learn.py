"""Learning with files on both ends: a plan becomes concept folders."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from shared.concept import Concept, save
from shared.io.contact_sheets import contact_sheet
from shared.io.counting import Steps, named
from shared.io.outputs import atomic_write
from shared.runner.base import Progress, Runner
from shared.runner.judging import references
from shared.runner.plan import Plan, warn_unseen
from shared.sampling.settings import SamplingSettings
from shared.train import checkpoint
from shared.types import Subject


def personalize(
    planned: Plan,
    runner: Runner,
    *,
    resume: bool = False,
    overwrite: bool = False,
    scorers: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Learn and save; the concept folders by name. The training folder keeps logs and samples, not the checkpoints.

    Without `resume`, what an earlier run left in the training folder is removed when the first step begins.
    """
    recipe = planned.recipe
    warn_unseen(runner.backbone, planned.subjects)
    concepts = runner.personalize(
        planned.subjects,
        recipe,
        planned.workdir,
        resume=resume,
        scorers=scorers,
        progress=progress,
    )
    saved = {}
    for name, concept in concepts.items():
        planned.outputs[name].parent.mkdir(parents=True, exist_ok=True)
        saved[name] = save(concept, planned.outputs[name], overwrite=overwrite or resume)
        runner.loaded[name] = replace(runner.loaded[name], concept=saved[name])
    for stale in planned.workdir.glob(f"{checkpoint.PREFIX}*"):
        shutil.rmtree(stale)
    for name, concept in saved.items():
        _add_preview(runner, name, planned.subjects[name], concept, progress)
    return dict(planned.outputs)


def _add_preview(
    runner: Runner, name: str, subject: Subject, concept: Concept, progress: Progress | None = None
) -> None:
    """Put `preview.png` into a concept's folder; the concept is complete without it, should painting it fail."""
    assert concept.path is not None
    try:
        told = named(progress.pictures if progress else None, f"the preview of {name!r}")
        picture = preview(runner, name, subject, concept, told)
    except RuntimeError as error:  # out of memory, above all
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{concept.path} is saved; its preview could not be painted ({why})", stacklevel=2)
        return
    with atomic_write(concept.path / "preview.png") as file:
        picture.save(file, "PNG")


def preview(runner: Runner, name: str, subject: Subject, concept: Concept, progress: Steps | None = None) -> Any:
    """references | new pictures, as the concept's `preview.png`."""
    side = runner.backbone.resolution
    sampling = concept.meta.learned_with.sampling
    prompts = [f"a photo of a <{n}>" for n in [name] * 4]
    pixels = runner.generate(
        prompts,
        range(4),
        SamplingSettings("", sampling.guidance, sampling.steps, sampling.scheduler),
        must_name=False,
        progress=progress,
    )
    return contact_sheet({"references": references(subject, side)[:4], "new": pixels})
