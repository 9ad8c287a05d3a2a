"""Makes assets for `pcs concept evaluate`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pcs_3d.assets import AssetFiles, create, write_turning
from pcs_3d.distill.reference_cameras import check_uses_concept, compares_with_subject
from pcs_3d.evaluation.asset_files import read_judged
from pcs_3d.evaluation.looks import raised
from pcs_3d.evaluation.truths import TrueToy
from pcs_3d.evaluation.views import as_model_pixels, cameras, draw
from pcs_3d.evaluation.yardstick import plain
from pcs_3d.extra import check_installed
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.benchmark.modality import Asked, Made, Shot
from shared.config import expanded
from shared.recipe.resolve import load
from shared.runner.bars import Bars
from shared.runner.judging import picture_case
from shared.runner.open_runner import model_asked_for, open_runner
from shared.toybox.reference_sets import shown_in
from shared.types import Subject


def check(asked: Asked) -> None:
    """Raises ValueError if no asset can be made as requested. The recipe may be unknown, learn the subject itself, or
    need more than a prompt and a concept; the model or the concept may be unsuitable; or a package that assets need may
    be missing."""
    check_installed()
    recipe = _recipe(asked, f"<{asked.name}>")
    check_uses_concept(asked.asset_recipe, recipe)
    if recipe.export is None:
        raise ValueError("export = null leaves no mesh to evaluate: choose a recipe that exports one")
    _opened(asked, recipe, [asked.concept]).check(recipe, _subjects(asked, recipe))


def make(asked: Asked, bars: Bars) -> Made:
    """Makes one asset of the subject and renders it from all around, as `pcs 3d evaluate` does."""
    recipe = _recipe(asked, f"<{asked.name}>")
    runner = _opened(asked, recipe, [asked.concept])
    subjects = _subjects(asked, recipe)
    start = time.perf_counter()
    frames, turning = _asset(runner, recipe, subjects, asked.out / "asset", bars)
    seconds = time.perf_counter() - start
    case = replace(picture_case(runner, runner.loaded[asked.name], asked.judged), through=None, through_key="")
    said, seed = plain(recipe.prompt, asked.class_noun), asked.seeds[0]
    files = {"the mesh (GLB)": turning.with_name("asset.glb"), "the turntable": turning.with_name("turntable.mp4")}
    shots, floor = [Shot(recipe.prompt, said, seed, frames, file=turning, more=files)], []
    if asked.floor:
        plainly = _recipe(asked, asked.class_noun or "thing")
        runner.unload(asked.name)
        base, _ = _asset(runner, plainly, subjects, asked.out / "asset-without-concept", bars)
        floor = [Shot(plainly.prompt, said, seed, base)]
    return Made(case, shots, floor, _true(asked), seconds)


def _recipe(asked: Asked, thing: str) -> Recipe3D:
    own = [f"prompt=a photo of a {thing}", f"seed={asked.seeds[0]}"]
    model = model_asked_for(asked.backbone, [asked.concept])
    recipe = load(asked.asset_recipe, [*asked.asset_settings, *own], "3d", Recipe3D, model)
    if recipe.backbone not in (str(model), str(expanded(str(model)))):
        raise ValueError(
            f"--set-asset backbone={recipe.backbone}: all modalities use the same model ({model}); change it with "
            "--backbone instead"
        )
    return recipe


def _subjects(asked: Asked, recipe: Recipe3D) -> dict[str, Subject]:
    """Returns the subject's pictures, if the recipe compares its renders with them."""
    return {asked.name: asked.subject} if compares_with_subject(recipe) else {}


def _opened(asked: Asked, recipe: Recipe3D, concepts: Sequence[str]) -> Runner3D:
    precision = recipe.train.mixed_precision
    runner = open_runner(Runner3D, asked.backbone, concepts, asked.device, precision, asked.download)
    if runner.backbone.frames is not None:
        raise ValueError(f"{runner.backbone.name} makes clips; assets need an image model")
    return runner


def _asset(
    runner: Runner3D, recipe: Recipe3D, subjects: dict[str, Subject], out: Path, bars: Bars
) -> tuple[Tensor, Path]:
    """Makes an asset. Returns renders of its mesh (`[16, 3, H, W]`, in [-1, 1]) and the path of its turntable."""
    files = AssetFiles(out)
    with bars.bar() as progress:
        asset = create(runner, recipe, files, subjects, progress=progress)
    shutil.rmtree(files.workdir, ignore_errors=True)
    turning = write_turning(asset, out / "turntable.webp")
    with torch.no_grad():
        return as_model_pixels(draw(read_judged(out).mesh, cameras())), turning


def _true(asked: Asked) -> tuple[Tensor, Tensor] | None:
    """Returns two sets of renders of the real object: one that determines the threshold for verification, and one from
    the evaluation's cameras. Returns None for a subject that is not from the toybox."""
    held = shown_in(asked.subject.images)
    if held is None:
        return None
    toy, around = TrueToy(held), cameras()
    return torch.cat([as_model_pixels(v) for v in raised(toy, around)]), as_model_pixels(toy.views(around))
