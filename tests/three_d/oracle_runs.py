"""Runs the whole engine on a real field of density and colour, with a teacher that knows a solid object exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import Distill, shown
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.hand_over import FIELD, restored, under
from pcs_3d.guidance.oracle import OracleScores
from pcs_3d.recipe import Recipe3D
from pcs_3d.references import References
from pcs_3d.renderers.rendering import RenderSettings
from shared.config import validate
from shared.io.contact_sheets import write_picture
from shared.io.read_subject import read_subject
from shared.recipe.phases import expand_phases
from shared.recipe.resolve import load
from shared.recipe.schema import dump
from shared.train.training_run import TASKS, TrainingRun
from shared.trainable import TrainableGroup
from shared.types import Subject
from tests.three_d.picture_scenes import psnr
from tests.three_d.solid_scenes import overlap, true_views, unseen_cameras

SIDE = 32
COMMON = (
    "backbone=tiny",
    "prompt=a photo of a mug",
    "train.steps=150",
    "train.batch_size=4",
    f"train.resolution={SIDE}",
    "train.mixed_precision=no",
    "train.checkpoint_every=0",
    "train.optimizers.main.schedule=cosine",
    "background.random=0",
    "shading={lambertian: 0, textureless: 0, ambient: 1}",
    "cameras={elevation_deg: [-10, 50], fov_deg: [24.53, 24.53], distance: [5, 5], jitter: 0, roll_deg: 0, look_at: 0}",
)
VOXELS = "field={resolution: 24, lr: 0.2, lr_features: 0.1}"
#: Additional settings for each guidance method. Timestep schedules that assume thousands of steps are replaced with a
#: constant range. `sdi` sums over a view instead of averaging. `sjc` uses pixels, because a field of latents can match
#: the views with any shape.
GUIDANCES: dict[str, tuple[str, ...]] = {
    "dreamfusion": (),
    "csd": (),
    "nfsd": (),
    "hifa": (),
    "lucid_dreamer": ("guidance.times.high=0.98",),
    "sdi": ("guidance.normalize=sum",),
    "sjc": ("guidance.space=pixels",),
    "prolificdreamer": ("guidance.times.high=0.98",),
}
#: The same for recipes in phases. Phases that train or use the diffusion model itself are left out.
PHASED: dict[str, tuple[str, ...]] = {
    "magic3d": (
        "phases.coarse.field={kind: voxels, resolution: 24, lr: 0.2, lr_features: 0.1}",
        f"phases.coarse.train={{steps: 150, resolution: {SIDE}}}",
        "phases.fine.field={resolution: 32, color_resolution: 32, lr: 0.02, start: {resolution: 32}}",
        "phases.fine.shading={lambertian: 0, textureless: 0, ambient: 1}",
        f"phases.fine.train={{steps: 60, resolution: {SIDE}}}",
    ),
    "dream_gaussian": (
        "background.colors=[[1, 1, 1]]",
        "phases.gaussians.field={count: 600, most: 1500, lr: 0.01, lr_features: 0.05}",
        f"phases.gaussians.train={{steps: 150, resolution: {SIDE}}}",
        "phases.texture.field={resolution: 32, start: {resolution: 32}}",
        f"phases.texture.train={{steps: 60, resolution: {SIDE}}}",
    ),
    "mv_dreambooth": (
        VOXELS,
        f"phases.grow.train={{steps: 150, batch_size: 4, resolution: {SIDE}}}",
    ),
    "realfusion": (
        VOXELS,
        f"phases.grow.train={{steps: 150, batch_size: 4, resolution: {SIDE}}}",
    ),
}


@dataclass(frozen=True)
class Found:
    """How well an object was recovered, measured over 16 views that were not seen in training."""

    iou: float
    psnr: float  # dB


def reconstructed(backbone: Any, name: str, folder: Path, *settings: str) -> Found:
    """Runs the guidance of a shipped recipe and measures how well it recovers the object.

    The recipe's penalties are left out, because their weights are tuned for the scores of a real model. Only the comparison
    with reference pictures stays.
    """
    own = PHASED[name] if name in PHASED else (VOXELS, *GUIDANCES[name])
    how = _distilled(load(name, [*COMMON, *own, *settings], "3d", Recipe3D))
    subjects = {}
    if isinstance(how.references, References):
        subjects = {"mug": _pictured(folder / "photos", how.references.cameras())}
    seen = _remembered(lambda cameras: 2 * true_views(cameras, SIDE).pixels - 1)

    def distill(context: Any) -> Distill:
        if how.guidance.student is not None:
            return _Taught(context, seen)
        return Distill(context, lambda *_: _oracle(seen))

    run = TrainingRun(
        backbone,
        how,
        subjects,
        folder / "run",
        folder / "cache",
        tensorboard=False,
        tasks={**TASKS, DistillTask: distill},
    )
    for _ in run.steps():
        pass
    *_, (_, last) = expand_phases(how)
    field = restored(last.made, 3, last.seed, under(run.carried, FIELD))
    cameras = unseen_cameras()
    made, truth = shown(last, field, cameras, SIDE, lambda z: z), true_views(cameras, SIDE)
    return Found(overlap(made.opacity, truth.coverage), psnr(made.pixels, truth.pixels, peak=1.0))


def _distilled(recipe: Recipe3D) -> Recipe3D:
    """Returns the recipe with only its distill phases, and only the penalty that compares views with pictures."""
    data = dump(recipe)
    of_phases = {name: phase.task for name, phase in expand_phases(recipe)}
    data["phases"] = {
        name: {key: value for key, value in phase.items() if key != "penalties"}
        for name, phase in data["phases"].items()
        if isinstance(of_phases[name], DistillTask)
    }
    data["penalties"] = {name: part for name, part in data["penalties"].items() if name == "reference_views"}
    return validate(Recipe3D, {**data, "sources": {}, "regularize": {}})


def _pictured(folder: Path, cameras: Cameras) -> Subject:
    """Writes true views of the object and their masks, and reads them as a subject's pictures."""
    views = true_views(cameras, 2 * SIDE)
    for i in range(len(cameras)):
        write_picture(2 * views.pixels[i] - 1, folder / f"{i:02d}.png")
        write_picture(2 * views.coverage[i].expand(3, -1, -1) - 1, folder / "masks" / f"{i:02d}.png")
    return read_subject(folder, "mug")


def _remembered(means: Callable[[Cameras], Tensor]) -> Callable[[Cameras], Tensor]:
    """Caches the result for the most recent cameras, because each step needs it several times."""
    last: list[Any] = [None, None]

    def of(cameras: Cameras) -> Tensor:
        key = torch.cat([v.reshape(-1) for v in vars(cameras).values()])
        if last[0] is None or not torch.equal(last[0], key):
            last[:] = [key, means(cameras)]
        return last[1]

    return of


def _oracle(seen: Callable[[Cameras], Tensor], **more: Any) -> OracleScores:
    """Returns a teacher that is nearly certain of each view with the prompt, and less certain without it."""
    scene = {"prompt": (seen, 0.05), "plain_prompt": (seen, 0.05)}
    scene |= {told: (seen, 0.7) for told in ("negative", "null", "away_near", "away_far")}
    return OracleScores(scene, **more)  # type: ignore[arg-type]


class _Taught(Distill):
    """A task whose student is a second field, which learns what the asset currently looks like from any side."""

    def __init__(self, context: Any, seen: Callable[[Cameras], Tensor]) -> None:
        recipe = context.recipe
        self.learned = recipe.field.build()

        def believed(cameras: Cameras) -> Tensor:
            view = RenderSettings(SIDE, SIDE, torch.ones(len(cameras), 3, 1, 1))
            return 2 * recipe.renderer.render(self.learned, cameras, view).pixels - 1

        super().__init__(context, lambda *_: _oracle(seen, student=believed))

    def _check_groups(self) -> None:
        """Checks nothing, because the student is not part of the backbone here."""

    def groups(self) -> dict[str, list[TrainableGroup]]:
        mine = {name: list(parts) for name, parts in self.field.groups().items()}
        return {**mine, "student": list(self.learned.groups()["main"])}
