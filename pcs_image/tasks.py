"""What the commands do, with files on both ends: from settings to concept folders, from prompts to pictures."""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_image.runner import Runner, metadata
from shared.backbones import Backbone, load_backbone
from shared.concept import Concept, load_home, read, save
from shared.config import NAME
from shared.io.files import atomic_folder, atomic_write, check_output
from shared.io.pictures import fit, picture_size, read_picture
from shared.io.sheets import contact_sheet, grid, write_picture
from shared.io.subjects import read_subject
from shared.recipe import Recipe
from shared.sampling.changes import StrengthSchedule
from shared.sources.reading import load
from shared.train import checkpoint
from shared.train.loop import Record
from shared.train.precision import DTYPES, resolve_precision
from shared.types import Subject

OnStep = Callable[[str, Record, int], None]


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


def personalize(
    planned: Plan,
    runner: Runner,
    *,
    resume: bool = False,
    overwrite: bool = False,
    scorers: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    on_pictures: Callable[[str, int, int], None] | None = None,
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
        on_step=on_step,
        on_pictures=on_pictures,
    )
    saved = {}
    for name, concept in concepts.items():
        planned.outputs[name].parent.mkdir(parents=True, exist_ok=True)
        saved[name] = save(concept, planned.outputs[name], overwrite=overwrite or resume)
        runner.loaded[name] = replace(runner.loaded[name], concept=saved[name])
    for stale in planned.workdir.glob(f"{checkpoint.PREFIX}*"):
        shutil.rmtree(stale)
    for name, concept in saved.items():
        _add_preview(runner, name, planned.subjects[name], concept)
    return dict(planned.outputs)


def _add_preview(runner: Runner, name: str, subject: Subject, concept: Concept) -> None:
    """Put `preview.png` into a concept's folder; the concept is complete without it, should painting it fail."""
    assert concept.path is not None
    try:
        picture = preview(runner, name, subject, concept)
    except RuntimeError as error:  # out of memory, above all
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{concept.path} is saved; its preview could not be painted ({why})", stacklevel=2)
        return
    with atomic_write(concept.path / "preview.png") as file:
        picture.save(file, "PNG")


def preview(runner: Runner, name: str, subject: Subject, concept: Concept) -> Any:
    """references | new pictures, as the concept's `preview.png`."""
    side = runner.backbone.resolution
    sampling = concept.meta.recipe.get("sampling", {})
    prompts = [f"a photo of a <{n}>" for n in [name] * 4]
    pixels = runner.generate(
        prompts,
        range(4),
        must_name=False,
        guidance=sampling.get("guidance"),
        steps=sampling.get("steps"),
        scheduler=sampling.get("scheduler"),
    )
    return contact_sheet({"references": references(subject, side)[:4], "new": pixels})


def references(subject: Subject, side: int) -> Tensor:
    """[N, 3, side, side] in [-1, 1]."""
    return torch.stack([fit(read_picture(p), side).pixels for p in subject.images])


def warn_unseen(backbone: Backbone, subjects: Mapping[str, Subject]) -> None:
    """The toybox takes any picture, and says that it has never seen the real world."""
    if backbone.name != "toybox":
        return
    for name, subject in subjects.items():
        sizes = {picture_size(p) for p in subject.images}
        if sizes != {(64, 64)}:
            warnings.warn(
                f"the pictures of {name!r} are not from the toybox, and the toybox has never seen the real world: what it "
                "paints will be toys. Give backbone=PATH to a Stable Diffusion folder for real photos.",
                stacklevel=2,
            )


def parse_concept(text: str) -> tuple[Path, float]:
    """`PATH` or `PATH:STRENGTH`. ValueError when the strength is no number or there is no such folder."""
    path, sep, strength = text.rpartition(":")
    if sep and not Path(text).exists():
        try:
            return Path(path), float(strength)
        except ValueError:
            raise ValueError(f"--concept {text!r}: {strength!r} is no strength; write PATH:0.8") from None
    return Path(text), 1.0


def open_runner(
    backbone: str | None, concepts: Sequence[str], device: str | None = None, precision: str = "no"
) -> Runner:
    """A runner with these concepts (`PATH[:STRENGTH]`) loaded on `backbone`, or on the one the first was learned on."""
    opened = [(read(p), s) for p, s in (parse_concept(c) for c in concepts)]
    where = check_device(device or best_device())
    if precision == "auto":  # in main memory the weights keep all their bits, and only what is computed is rounded
        precision = resolve_precision(precision, where) if torch.device(where).type == "cuda" else "no"
    dtype = DTYPES[precision]
    options: dict[str, Any] = {"device": where, "dtype": dtype}
    home = load_home(opened[0][0], backbone, **options) if opened else load_backbone(backbone, **options)
    runner = Runner(home)
    for concept, strength in opened:
        runner.load(concept, strength)
    return runner


def read_by(concepts: Sequence[str], backbone: str | None) -> list[Path]:
    """The folders that `open_runner` reads: no output may take their place."""
    local = [Path(backbone).expanduser()] if backbone and Path(backbone).expanduser().exists() else []
    return [*(parse_concept(c)[0] for c in concepts), *local]


def check_device(device: str) -> str:
    """The same name; ValueError when this machine has no such device."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
        there = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise ValueError(f"--device {device!r} cannot be used here ({why}). There are: {there}.") from None
    return device


def best_device() -> str:
    """ "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def generate(
    runner: Runner,
    prompts: Sequence[str],
    out: Path,
    *,
    num: int = 1,
    seed: int = 0,
    overwrite: bool = False,
    as_grid: bool = False,
    **settings: Any,
) -> list[Path]:
    """`num` pictures per prompt with seeds seed, seed + 1, …: one PNG each, with all that made it inside."""
    check_output(out, overwrite)
    shots = [(p, seed + i) for p in prompts for i in range(num)]
    pixels = runner.generate([p for p, _ in shots], [s for _, s in shots], **settings)
    paths = []
    with atomic_folder(out, overwrite=overwrite) as folder:
        for index, ((prompt, number), picture) in enumerate(zip(shots, pixels, strict=True)):
            name = f"{index:03d}-seed{number}.png"
            write_picture(picture, folder / name, metadata(prompt, number, runner, **settings))
            paths.append(out / name)
        if as_grid:
            grid(pixels, columns=num).save(folder / "grid.png")
            paths.append(out / "grid.png")
    return paths


def check_strengths(texts: Sequence[str]) -> list[StrengthSchedule]:
    """Strengths by step, as `StrengthSchedule.parse` reads them; ValueError names the option."""
    try:
        changes = [StrengthSchedule.parse(text) for text in texts]
    except ValueError as error:
        raise ValueError(f"--strength: {error}") from None
    names = [name for change in changes for name in change.strengths]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--strength: {name!r} is given twice; write all its points in one, separated by commas")
    return changes


def check_precision(precision: str) -> str:
    """ "no", "bf16" or "fp16"; ValueError otherwise."""
    if precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"--precision {precision!r}: choose no, bf16 or fp16")
    return precision
