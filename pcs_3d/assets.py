"""Makes an asset from a recipe and a prompt, and writes it as a folder with a mesh, renders and a turntable."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pcs_3d.cameras import turntable
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.memory_plan import MemoryPlan
from pcs_3d.export.asset import Exported, export_asset
from pcs_3d.export.page import PAGE, page_html
from pcs_3d.export.settings import ExportSettings
from pcs_3d.runner import Asset, Runner3D
from shared.concept.provenance import portable, public_name
from shared.evaluation.picture_rows import pngs
from shared.io.clips.write_clip import write_clip
from shared.io.contact_sheets import write_picture
from shared.io.locks import hold, holding
from shared.io.outputs import atomic_folder, check_apart, check_output, write_text
from shared.io.read_subject import plain_noun
from shared.prompts import without
from shared.recipe.schema import dump
from shared.runner.base import Progress
from shared.train import checkpoint
from shared.train.log import check_log
from shared.types import Subject

#: Called with the field, the folder and the export settings. Writes a mesh into the folder and returns a description of
#: it.
Export = Callable[[Any, Path, Any], Exported]
ABOUT = "asset.json"
_SIDES, _SECONDS = 8, 3.0
_REFERENCES, _REFERENCE = 8, 96  # how many of a subject's pictures the page shows, and their side length in pixels
_TURN_FRAMES, _TURN_SIDE = 24, 128  # frame count of a page's turntable, and the side length of its frames in pixels


@dataclass(frozen=True)
class AssetFiles:
    """Where an asset and the state of its run are written."""

    out: Path
    overwrite: bool = False
    resume: bool = False

    @property
    def workdir(self) -> Path:
        return self.out.with_name(self.out.name + ".training")

    def check_apart(self, read: Sequence[Path]) -> None:
        """Raises ValueError if the asset or the state of its run would overlap one of the inputs `read`."""
        for path in (self.out, self.workdir):
            check_apart(path, read)

    def check(self, read: Sequence[Path] = ()) -> bool:
        """Returns whether the asset is already finished. Raises ValueError if existing output or one of the inputs `read`
        would be overwritten, or if an interrupted run is neither resumed nor overwritten."""
        self.check_apart(read)
        anew = self.overwrite and not self.resume
        begun = not anew and checkpoint.load(self.workdir) is not None
        if self.resume and not begun and not self.overwrite and (self.out / ABOUT).is_file():
            return True
        check_output(self.out, self.overwrite or (self.resume and begun))
        if begun and not self.resume:
            raise ValueError(
                f"{self.workdir} holds an interrupted run: continue it with --resume, or start over with --overwrite"
            )
        if begun:
            hold(self.workdir)
            check_log(self.workdir)
            return False
        check_output(self.workdir, overwrite=True)
        if self.resume:
            warnings.warn(f"{self.workdir} has no interrupted run to resume, so a new run starts", stacklevel=2)
        return False


@holding()
def create(
    runner: Runner3D,
    recipe: DistillRecipe,
    files: AssetFiles,
    subjects: dict[str, Subject] | None = None,
    progress: Progress | None = None,
    export: Export = export_asset,
    plan: MemoryPlan | None = None,
) -> Asset:
    """Creates an asset and writes it. The folder appears only once it is complete; the saved state of the run is then
    deleted.

    Args:
        plan: the memory plan, if the recipe was changed to fit a budget. It is recorded in the asset.

    Raises:
        ValueError: the asset cannot be written (`check_output`), the prompt, concepts and recipe are incompatible, or the
            field is empty. The state of the run is kept.
    """
    check_output(files.out, files.overwrite or files.resume)
    hold(files.workdir)
    asset = runner.create(recipe, files.workdir, subjects, resume=files.resume, progress=progress)
    if plan is not None:
        asset = replace(asset, costs={**asset.costs, **plan.costs})
    with atomic_folder(files.out, files.overwrite or files.resume) as folder:
        how = asset.recipe.export
        write_views(asset, folder, how)
        made = None if how is None else export(asset.field, folder, how)
        told = about(runner, recipe, asset, made)
        write_text(folder / ABOUT, json.dumps(told, indent=1))
        write_text(folder / PAGE, page_html(folder, told, asset.recipe, known(runner, subjects or {})))
    checkpoint.drop(files.workdir)
    return asset


@torch.no_grad()
def write_views(asset: Asset, folder: Path, how: ExportSettings | None) -> None:
    """Writes a turntable and renders from eight sides. Without export settings, both are the same size as the
    training views."""
    side, frames = (None, 48) if how is None else (how.picture, how.frames)
    around = asset.views(turntable(_SIDES), side).pixels
    for i, picture in enumerate(around):
        write_picture(2 * picture - 1, folder / "renders" / f"{round(360 * i / _SIDES):03d}.png")
    turning = asset.views(turntable(frames), side).pixels
    write_clip(folder / "turntable.mp4", (2 * turning - 1).transpose(0, 1), frames / _SECONDS)


def known(runner: Runner3D, subjects: Mapping[str, Subject]) -> list[tuple[str, bytes]]:
    """Returns labelled PNGs for the page. They show what the asset was made from: previews of the loaded concepts and
    pictures of the run's subjects."""
    previews = [(name, loaded.concept.preview) for name, loaded in runner.loaded.items()]
    out = [(f"concept {name}", path.read_bytes()) for name, path in previews if path is not None and path.is_file()]
    for name, subject in subjects.items():
        pictures = pngs(runner.shown(subject, _REFERENCE))[:_REFERENCES]
        out += [(f"{name}, picture {i + 1}", png) for i, png in enumerate(pictures)]
    return out


@torch.no_grad()
def write_turning(asset: Asset, path: Path) -> Path:
    """Writes one full turn of an asset as an animated WebP, for use in HTML pages."""
    around = asset.views(turntable(_TURN_FRAMES), _TURN_SIDE).pixels
    return write_clip(path, (2 * around - 1).transpose(0, 1), _TURN_FRAMES / _SECONDS)


def about(runner: Runner3D, recipe: DistillRecipe, asset: Asset, made: Exported | None) -> dict[str, Any]:
    """Returns the contents of asset.json: a description of the asset and everything needed to reproduce it."""
    backbone = runner.backbone
    return {
        "prompt": recipe.prompt,
        "plain_prompt": without(recipe.prompt, _nouns(runner, recipe)),
        "concepts": {name: backbone.strengths.get(name, 1.0) for name in runner.loaded},
        "backbone": public_name(backbone.name),
        "checkpoint": backbone.checkpoint,
        "recipe": portable(dump(recipe)),
        "costs": dict(asset.costs),
        "mesh": None if made is None else {k: getattr(made, k) for k in ("faces", "watertight", "volume", "notes")},
    }


def _nouns(runner: Runner3D, recipe: DistillRecipe) -> dict[str, str]:
    """Returns the class nouns, by name, of the loaded concepts and of any subject that the recipe itself learns."""
    nouns = dict(runner.class_nouns)
    if recipe.subject is not None and recipe.name is not None:
        nouns.setdefault(recipe.name, plain_noun(recipe.subject.class_noun))
    return {name: noun or "thing" for name, noun in nouns.items()}
