"""Finds where the subject's pictures were taken from, usually by comparing them with a preliminary asset."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pcs_3d.camera_estimation import Estimate, from_renders, from_toybox_poses
from pcs_3d.cameras import Cameras
from pcs_3d.distill.distill import recipe_of
from pcs_3d.distill.distill_recipe import DistillRecipe
from pcs_3d.distill.earlier_asset import EarlierAsset
from pcs_3d.distill.reference_cameras_task import ReferenceCamerasTask
from pcs_3d.references import References, camera_entry, only
from pcs_3d.renderers.rendering import Rendering
from shared.io.contact_sheets import write_picture
from shared.io.outputs import write_text
from shared.recipe.phases import expand_phases, learns_subjects
from shared.runner.judging import reference_masks, references
from shared.sources.phase_pictures import KEPT
from shared.toybox.reference_sets import shown_in
from shared.train.phase_context import ConceptTask, PhaseContext
from shared.train.task import Updates
from shared.types import Subject

_SIDE = 64  # side length in pixels of the renders that pictures are compared with


def compares_with_subject(recipe: DistillRecipe) -> bool:
    """Returns whether the field is compared with pictures of a subject that no phase learns. The subject then comes
    from a loaded concept."""
    if learns_subjects(recipe):
        return False
    phases = [phase for _, phase in expand_phases(recipe)]
    return any(isinstance(p.task, ReferenceCamerasTask) or isinstance(p.references, References) for p in phases)


def check_uses_concept(name: str, recipe: DistillRecipe) -> None:
    """Raises ValueError if the recipe `name` learns the subject itself instead of using a loaded concept."""
    if learns_subjects(recipe):
        raise ValueError(
            f"--asset-recipe {name} itself learns the subject from its pictures, so the asset would not show what the "
            "concept has learned: choose a recipe that only makes assets, such as texture_refinement"
        )


def check_subject(phase: str, task: ReferenceCamerasTask, subjects: Mapping[str, Subject]) -> None:
    """Raises ValueError unless there is one subject whose pictures all have masks. If `near_deg` is set, it must have
    one azimuth per picture."""
    subject = only(subjects)
    if bare := [path.name for path in subject.images if path not in subject.masks]:
        raise ValueError(
            f"phases.{phase} crops the pictures to the subject and needs masks, but {', '.join(bare)} "
            f"{'has' if len(bare) == 1 else 'have'} none: put masks/NAME.png next to the pictures"
        )
    if task.near_deg is not None and len(task.near_deg) != len(subject.images):
        raise ValueError(
            f"phases.{phase}.task.near_deg must have one azimuth per picture ({len(subject.images)}), but has "
            f"{len(task.near_deg)}; give them in this order: {', '.join(p.name for p in subject.images)}"
        )


class ReferenceCameras(ConceptTask):
    """See `ReferenceCamerasTask`. Raises ValueError unless there is one subject whose pictures all have masks. The
    estimator `renders` also needs an asset to render (see `EarlierAsset`)."""

    steps = 1

    def __init__(self, context: PhaseContext) -> None:
        super().__init__(context)
        task: Any = recipe_of(context).task
        self.task: ReferenceCamerasTask = task
        check_subject(context.name, task, context.subjects)
        self.asset = EarlierAsset(context) if task.estimator == "renders" else None

    def updates(self, step: int, micro: int) -> Updates:
        """Yields nothing, because there is no loss. `result` does the work."""
        yield from ()

    @torch.no_grad()
    def result(self) -> list[dict[str, Any]]:
        """Writes the cropped pictures and masks, and a file that lists them with their cameras. Returns the entries of
        that list."""
        recipe, folder = recipe_of(self.context), self.context.folder
        side = recipe.train.resolution or self.context.backbone.resolution
        subject = only(self.context.subjects)
        masks = reference_masks(subject, 2 * side)
        assert masks is not None  # checked before
        pixels, masks = (references(subject, 2 * side) + 1) / 2, masks[:, None]
        found = self._estimate(pixels, masks)
        cut, shown = found.cut(pixels, side), found.cut(masks, side, "zeros")
        folder.mkdir(parents=True, exist_ok=True)
        kept: list[dict[str, Any]] = []
        for i, path in enumerate(subject.images):
            about = {"file": f"{i:02d}.png", "mask": f"{i:02d}-mask.png", **camera_entry(found.cameras, i)}
            if found.agreement is not None:
                about["agreement"] = round(float(found.agreement[i]), 3)
            write_picture(2 * cut[i] - 1, folder / about["file"], {"pcs": json.dumps({"picture": path.name})})
            write_picture(2 * shown[i].expand(3, -1, -1) - 1, folder / about["mask"], {})
            kept.append({**about, "picture": path.name})
        write_text(folder / KEPT, json.dumps({"phase": self.context.name, "kept": kept}, indent=1))
        return kept

    def _estimate(self, pixels: Tensor, masks: Tensor) -> Estimate:
        task = self.task
        if self.asset is None:
            if shown_in(only(self.context.subjects).images) is None:
                warnings.warn(
                    "task.estimator = toybox: the pose estimator works only for the toybox's own pictures, so the "
                    "cameras of these pictures are probably wrong; set "
                    f"phases.{self.context.name}.task.estimator=renders to compare the pictures with renders of the "
                    "asset instead",
                    stacklevel=2,
                )
            return from_toybox_poses(task.framing, pixels)
        asset = self.asset

        def renders(cameras: Cameras) -> Rendering:
            return asset.shown(cameras, _SIDE)

        return from_renders(renders, task.framing, pixels, masks, task.search)
