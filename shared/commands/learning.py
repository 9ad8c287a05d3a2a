"""Learns and saves concepts for `pcs image personalize` and `pcs video personalize`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.recipe.schema import Recipe
from shared.runner.base import Runner


@dataclass(frozen=True)
class Medium:
    """The kind of data that a package learns from and generates."""

    modality: str  # the modality of its recipes ("image" or "video")
    recipe: type[Recipe]
    runner: type[Runner]


@dataclass(frozen=True)
class Learning:
    """The command-line options of a run, apart from its recipe and settings."""

    resume: bool = False
    overwrite: bool = False
    concepts: Sequence[str] = ()
    device: str | None = None
    download: bool = False
    clip: Path | None = None
    dino: Path | None = None
    how: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments for the runner's `prepared`


def learn(medium: Medium, recipe: str, settings: Sequence[str], asked: Learning) -> None:
    """Learns the recipe's concepts, showing progress on the terminal, and prints where they are saved. Invalid options
    raise ValueError before any heavy work starts."""
    from shared.commands.progress import Bar
    from shared.recipe.resolve import load
    from shared.runner.judging import check_folders
    from shared.runner.learn import personalize
    from shared.runner.open_runner import model_asked_for, open_runner, read_by
    from shared.runner.plan import plan
    from shared.train import checkpoint

    resolved = load(recipe, settings, medium.modality, medium.recipe, model_asked_for(None, asked.concepts))
    scored_with = [folder for folder in (asked.clip, asked.dino) if folder is not None]
    planned = plan(resolved, asked.overwrite, asked.resume, [*read_by(asked.concepts, None), *scored_with])
    if planned.finished:
        print("\n".join(f"already finished: <{name}> is in {path}" for name, path in planned.outputs.items()))
        return
    check_folders(asked.clip, asked.dino)
    medium.runner.check_plan(planned, model_asked_for(resolved.backbone, asked.concepts))
    precision, how = resolved.train.mixed_precision, {**resolved.opening(), **asked.how}
    runner = open_runner(
        medium.runner, resolved.backbone, asked.concepts, asked.device, precision, asked.download, **how
    )
    scorers = medium.runner.scorers(planned, runner.backbone, asked.clip, asked.dino)
    with Bar() as bar:
        try:
            options: dict[str, Any] = {"resume": asked.resume, "overwrite": asked.overwrite}
            made = personalize(planned, runner, scorers=scorers, progress=bar, **options)
        except KeyboardInterrupt:
            if checkpoint.load(planned.workdir) is not None:
                print(f"progress is saved in {planned.workdir}; continue with --resume", file=sys.stderr)
            raise
    for name, path in made.items():
        print(f"<{name}> is in {path}")
