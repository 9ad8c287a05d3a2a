"""Plans a run. Determines its subjects and outputs from its settings, and checks them before any heavy work."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from shared.backbones import Backbone
from shared.concept import Concept, read
from shared.concept.concept_folder import META
from shared.concept.provenance import plain, portable
from shared.config import NAME
from shared.io.checksums import sha256
from shared.io.decode import picture_size
from shared.io.locks import hold
from shared.io.outputs import check_apart, check_output
from shared.io.terminal import encodable
from shared.recipe.phases import check_learns, expand_phases
from shared.recipe.reads import paths_read
from shared.recipe.schema import Recipe
from shared.sources.to_example import load
from shared.train import checkpoint
from shared.train.log import check_log
from shared.train.preflight import check_sources
from shared.train.resuming import same_recipe
from shared.types import Subject


@dataclass(frozen=True)
class Plan:
    """A run that the user requested, with its subjects and the output folder of each concept, by name."""

    recipe: Recipe
    subjects: Mapping[str, Subject]
    outputs: Mapping[str, Path]
    workdir: Path
    finished: bool = False  # whether the concepts have already been learned with this recipe


def plan(recipe: Recipe, overwrite: bool = False, resume: bool = False, inputs: Iterable[Path] = ()) -> Plan:
    """Reads the subjects and determines the concepts' names and folders. Raises ValueError if anything is wrong, before
    a model is loaded or a file is written.

    Args:
        inputs: paths that the run reads besides its recipe's files (concepts, scorers). No output may overlap them.
    """
    check_learns(recipe)
    subjects = dict(recipe.subjects)
    if recipe.subject is not None:
        stem = recipe.output.name.removesuffix(".concept") if recipe.output else "concept"
        subjects = {recipe.name or stem: recipe.subject}
    if not subjects:
        raise ValueError("no pictures: set subject.images=FOLDER (and subject.class_noun=WORD)")
    one = recipe.subject is not None
    output = recipe.output or Path(f"{next(iter(subjects))}.concept" if one else "concepts")
    outputs = {n: output if one else output / f"{n}.concept" for n in subjects}
    wrong = next((n for n in subjects if not re.match(NAME, n)), None)
    if wrong is not None:
        raise ValueError(
            f"a concept cannot be called {wrong!r} (use only letters, digits, - and _): set name=… or another output"
        )
    workdir = output.with_name(output.name.removesuffix(".concept") + ".training")
    for path in (*outputs.values(), workdir):
        check_apart(path, [*paths_read(recipe), *inputs])
    begun = _check_outputs(outputs, workdir, overwrite, resume)
    subjects = {n: s.read() for n, s in subjects.items()}
    for subject in subjects.values():
        for path in (*outputs.values(), workdir):
            # unlike the first check, this one follows links inside folders
            check_apart(path, [*subject.files, *subject.masks.values()])
        for path in subject.images:
            load(path, subject.masks.get(path))  # report an unreadable picture now, not after the model is loaded
    check_sources(list(expand_phases(recipe)), subjects)
    _warn_without_class_noun(recipe, subjects)
    finished = resume and not begun and not overwrite and _all_there(outputs)
    if finished:
        for name, path in outputs.items():
            _check_learned_so(recipe, read(path), subjects[name])
    elif resume and not begun:
        warnings.warn(encodable(f"{workdir} has no interrupted run to resume, so a new run starts"), stacklevel=2)
    return Plan(recipe, subjects, outputs, workdir, finished)


def _warn_without_class_noun(recipe: Recipe, subjects: Mapping[str, Subject]) -> None:
    """Warns about subjects without a class noun if the recipe puts the class noun in every caption."""
    if recipe.kind != "subject" or not recipe.modifier.with_class_noun:
        return
    for name, subject in subjects.items():
        if not subject.class_noun:
            key = "subject" if recipe.subject is not None else f"subjects.{name}"
            message = (
                f"{name!r} has no class noun: set {key}.class_noun to a plain word for what it is, for example mug"
            )
            warnings.warn(message, UserWarning, stacklevel=3)


def _check_outputs(outputs: Mapping[str, Path], workdir: Path, overwrite: bool, resume: bool) -> bool:
    """Returns whether there is an interrupted run to resume. Raises ValueError if that run or other existing
    files would be overwritten."""
    anew = overwrite and not resume  # leftovers from an earlier run are removed when this one begins
    begun = not anew and checkpoint.load(workdir) is not None
    for path in () if resume and not begun and not overwrite and _all_there(outputs) else outputs.values():
        check_output(path, overwrite or (resume and begun))
    if begun and not resume:
        raise ValueError(
            f"{workdir} holds an interrupted run: continue it with --resume, or start over with --overwrite"
        )
    if begun:
        hold(workdir)  # another output, with or without ".concept", may have the same training folder
        check_log(workdir)
    else:
        check_output(workdir, overwrite=True)  # only an earlier run's logs and samples may be removed
    return begun


def _all_there(outputs: Mapping[str, Path]) -> bool:
    return all((path / META).is_file() for path in outputs.values())


def _check_learned_so(recipe: Recipe, concept: Concept, subject: Subject) -> None:
    """Raises ValueError if a finished concept was learned with another recipe or from other pictures."""
    same_recipe(portable(concept.meta.recipe), portable(plain(recipe)), finished=True)
    hashes = [r.sha256 for r in concept.meta.references if r.sha256]  # files that have been moved have no hash
    if len(hashes) == len(concept.meta.references) and sorted(hashes) != sorted(map(sha256, subject.files)):
        raise ValueError(
            f"{concept.path} is finished, but was learned from other pictures: choose another output, or start over with "
            "--overwrite"
        )


def warn_unseen(backbone: Backbone, subjects: Mapping[str, Subject]) -> None:
    """Warns when pictures do not come from the synthetic world that the model was trained on."""
    world = backbone.world
    for name, subject in subjects.items() if world else ():
        assert world is not None
        if subject.images and {picture_size(p) for p in subject.images} != {(world.side, world.side)}:
            warnings.warn(f"the pictures of {name!r} {world.unseen}", stacklevel=2)
