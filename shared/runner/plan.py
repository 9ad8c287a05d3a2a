"""A run as the user asked for it: settings become subjects and outputs, checked before anything heavy begins."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.backbones import Backbone
from shared.config import NAME
from shared.io.decode import picture_size
from shared.io.outputs import check_output
from shared.io.read_subject import read_subject
from shared.recipe.schema import Recipe
from shared.sources.to_example import load
from shared.train import checkpoint
from shared.types import Subject


@dataclass(frozen=True)
class Plan:
    """A run as the user asked for it: subjects by name, and where each concept goes."""

    recipe: Recipe
    subjects: Mapping[str, Subject]
    outputs: Mapping[str, Path]
    workdir: Path


def plan(recipe: Recipe, overwrite: bool = False, resume: bool = False) -> Plan:
    """Read the subjects and settle the names. Raises ValueError before anything heavy is loaded or written."""
    given = dict(recipe.subjects)
    if recipe.subject is not None:
        stem = recipe.output.name.removesuffix(".concept") if recipe.output else "concept"
        given = {recipe.name or stem: recipe.subject}
    if not given:
        raise ValueError("no pictures: give subject.images=FOLDER (and subject.class_noun=WORD)")
    one = recipe.subject is not None
    output = recipe.output or Path(f"{next(iter(given))}.concept" if one else "concepts")
    outputs = {n: output if one else output / f"{n}.concept" for n in given}
    wrong = next((n for n in given if not re.match(NAME, n)), None)
    if wrong is not None:
        raise ValueError(
            f"a concept cannot be called {wrong!r} (letters, digits, - and _): say name=… or another output"
        )
    workdir = output.with_name(output.name.removesuffix(".concept") + ".training")
    anew = overwrite and not resume  # what an earlier run left is cleared away when this one begins
    begun = not anew and checkpoint.load(workdir) is not None
    for path in outputs.values():
        check_output(path, overwrite or (resume and begun))
    if begun and not resume:
        raise ValueError(f"{workdir} holds an interrupted run: go on with --resume, or start anew with --overwrite")
    if resume and not begun:
        warnings.warn(f"{workdir} holds no interrupted run: this one starts at the beginning", stacklevel=2)
    subjects = {n: read_subject(_images(s.images), s.class_noun, s.masks, s.captions) for n, s in given.items()}
    for subject in subjects.values():
        for path in outputs.values():
            check_output(path, True, [*subject.images, *subject.masks.values()])
        for path in subject.images:
            load(path, subject.masks.get(path))  # one that cannot be read is said now, not after the model is loaded
    return Plan(recipe, subjects, outputs, workdir)


def _images(images: Path | Sequence[Path]) -> Any:
    return images if isinstance(images, Path) else list(images)


def warn_unseen(backbone: Backbone, subjects: Mapping[str, Subject]) -> None:
    """A model of a world of its own takes any picture, and says that it has never seen others."""
    world = backbone.world
    for name, subject in subjects.items() if world else ():
        assert world is not None
        if {picture_size(p) for p in subject.images} != {(world.side, world.side)}:
            warnings.warn(f"the pictures of {name!r} {world.unseen}", stacklevel=2)
