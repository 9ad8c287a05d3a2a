"""Tests estimating the cameras of pictures, by comparison with renders or with the toybox's pose estimator."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pcs_3d.camera_estimation import Framing, Search, from_renders, from_toybox_poses
from pcs_3d.cameras import FOV_DEG, Cameras, turntable, wrapped_deg
from pcs_3d.distill.distill import Distill
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.pseudo_views import blank_views
from pcs_3d.recipe import Recipe3D
from pcs_3d.references import PhaseViews
from pcs_3d.renderers.rendering import Rendering
from pcs_3d.runner import Runner3D
from shared.io.read_subject import read_subject
from shared.recipe.resolve import load
from shared.sources.phase_pictures import read_kept
from shared.toybox.render import render
from shared.toybox.subjects import reference_scenes, subjects
from tests.core.runs import paint
from tests.three_d.solid_scenes import true_views

FRAMING = Framing(FOV_DEG, 0.6)
SMALL = ("backbone=tiny", "prompt=a photo of a mug", "setting=", "train.mixed_precision=no", "train.checkpoint_every=0",
         "field.resolution=12", "renderer={kind: volume, samples: 16}", "guidance.resolution=32", "sampling.steps=4",
         "phases.cameras.task={azimuths: 4, elevation_deg: [15.0], refinements: 1}", "phases.cameras.train.resolution=16",
         "phases.paint.field.resolution=8",
         "phases.paint.field.start={resolution: 16, faces: 100}", "phases.paint.renderer={kind: mesh}",
         *(f"phases.{p}.train={{steps: 2, batch_size: 1, resolution: 16}}" for p in ("form", "fit", "paint")))  # fmt: skip


def renders(cameras: Cameras) -> Rendering:
    views = true_views(cameras, 48)
    return Rendering(views.pixels, views.coverage, views.coverage)


def elsewhere(pictures: Tensor, place: tuple[float, float], scale: float) -> Tensor:
    """Returns pictures in which the object is smaller and off-centre. `Estimate.cut` undoes this change."""
    theta = torch.tensor([[1 / scale, 0, -place[0] / scale], [0, 1 / scale, -place[1] / scale]])
    where = F.affine_grid(theta.expand(len(pictures), 2, 3), list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, where, padding_mode="zeros", align_corners=False)


def test_cameras_are_found_wherever_the_object_is_in_its_picture():
    true = FRAMING.cameras(torch.tensor([20.0, 95.0, -170.0, -62.0]), torch.tensor([20.0, 8.0, 35.0, 55.0]))
    seen = true_views(true, 96)
    place, scale = (0.2, -0.15), 0.7
    found = from_renders(renders, FRAMING, elsewhere(seen.pixels, place, scale), elsewhere(seen.coverage, place, scale))
    assert float(wrapped_deg(found.cameras.azimuth_deg - true.azimuth_deg).abs().max()) <= 6
    assert float((found.cameras.elevation_deg - true.elevation_deg).abs().max()) <= 8
    assert torch.allclose(found.centre, torch.tensor(place).expand(4, 2), atol=0.05)
    assert torch.allclose(found.size, torch.full((4,), scale), atol=0.05)
    back = found.cut(elsewhere(seen.coverage, place, scale), 96, "zeros")
    assert float((back - seen.coverage).abs().mean()) < 0.03
    assert found.agreement is not None and float(found.agreement.min()) > 0.8


def test_a_rough_azimuth_narrows_the_search():
    true = FRAMING.cameras(torch.tensor([20.0, 20.0]), torch.tensor([20.0, 20.0]))
    seen = true_views(true, 48)
    found = from_renders(renders, FRAMING, seen.pixels, seen.coverage, Search(near_deg=(0.0, 180.0)))
    right, wrong = wrapped_deg(found.cameras.azimuth_deg).tolist()
    assert abs(right - 20) <= 6 and abs(wrong) > 110
    assert found.agreement is not None and float(found.agreement[0]) > float(found.agreement[1])


def test_an_object_with_different_colours_has_a_lower_agreement():
    true = FRAMING.cameras(torch.tensor([20.0]), torch.tensor([20.0]))
    seen = true_views(true, 48)
    right = from_renders(renders, FRAMING, seen.pixels, seen.coverage).agreement
    wrong = from_renders(renders, FRAMING, 1 - seen.pixels, seen.coverage).agreement
    assert right is not None and wrong is not None and float(right) > float(wrong) + 0.2


def test_empty_masks_and_empty_assets_are_refused():
    seen = true_views(turntable(2), 32)
    with pytest.raises(ValueError, match="the mask of picture 2 is empty"):
        from_renders(renders, FRAMING, seen.pixels, seen.coverage * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1))

    def nothing(cameras: Cameras) -> Rendering:
        empty = torch.zeros(len(cameras), 1, 16, 16)
        return Rendering(empty.expand(-1, 3, -1, -1) + 1, empty, empty)

    with pytest.raises(ValueError, match="the asset is empty"):
        from_renders(nothing, FRAMING, seen.pixels, seen.coverage)


def test_the_pose_estimator_finds_the_cameras_of_toybox_pictures():
    thing = next(s for s in subjects("development") if s.name == "development-robot").thing
    scenes = reference_scenes(thing, 5, 0)
    taken = [scene.cameras[0] for scene in scenes]
    found = from_toybox_poses(Framing(FOV_DEG, 0.92), render(scenes).pixels)
    azimuths = torch.tensor([camera.azimuth_deg for camera in taken])
    assert float(wrapped_deg(found.cameras.azimuth_deg - azimuths).abs().max()) < 15
    assert torch.allclose(found.size, torch.tensor([camera.scale for camera in taken]), atol=0.12)
    assert torch.allclose(found.centre / 2, torch.tensor([[c.x, c.y] for c in taken]), atol=0.04)
    rolls = torch.tensor([camera.roll_deg for camera in taken])
    assert float((found.cameras.roll_deg - rolls).abs().max()) < 4


@pytest.mark.parametrize("roll_deg", [25.0, -25.0])
def test_a_positive_roll_is_clockwise_for_both_kinds_of_camera(roll_deg):
    """If the toybox's cameras rolled the other way, the estimated rolls would be applied in reverse."""
    thing = next(s for s in subjects("development") if s.name == "development-robot").thing
    (upright,) = reference_scenes(thing, 1, 0)
    leaning = replace(upright, cameras=(replace(upright.cameras[0], roll_deg=roll_deg, x=0.0, y=0.0, scale=1.0),))
    rows = render([leaning]).mask.float().reshape(64, 64)
    head = rows[rows.sum(1) > 0][:8]
    toybox = float((head.sum(0) * torch.linspace(-1, 1, 64)).sum() / head.sum())
    ours, _ = Cameras.of([20.0], 15.0, roll_deg=roll_deg).project(torch.tensor([[0.0, 0.0, 0.9]]))
    assert toybox * roll_deg > 0 and float(ours[0, 0, 0]) * roll_deg > 0


@pytest.fixture
def subject(tmp_path: Path) -> dict[str, Any]:
    return {"mug": read_subject(paint(tmp_path / "photos"), "mug")}


def reconstruction(*more: str) -> Recipe3D:
    return load("reference_reconstruction", [*SMALL, *more], "3d", Recipe3D)


def test_the_field_is_fitted_to_pictures_whose_cameras_were_estimated(sd, subject, tmp_path):
    """The subject is not learned, so it has no name and the prompt does not mention it."""
    compared: dict[str, int] = {}

    class Watched(Distill):
        def __init__(self, context):
            super().__init__(context)
            if self.pictures is not None:
                compared[context.name] = len(self.pictures.pixels)
                assert self.pictures.masks is not None

    runner = Runner3D(sd)
    runner.tasks = {**runner.tasks, DistillTask: Watched}  # type: ignore[misc]
    asset = runner.create(reconstruction(), tmp_path / "run", subject, tensorboard=False)
    pictures = subject["mug"].images
    kept = read_kept(tmp_path / "run" / "phases" / "cameras")
    assert [entry["picture"] for entry in kept] == [p.name for p in pictures]
    assert all(entry["agreement"] is not None for entry in kept)
    assert compared == {"fit": len(pictures), "paint": len(pictures)}
    assert not sd.placeholders and not sd.adapters
    assert asset.recipe.field.kind == "textured_mesh"


def test_phases_that_use_pictures_from_earlier_phases_can_be_fitted_into_memory(sd, subject, tmp_path):
    plan = Runner3D(sd).fit(reconstruction(), tmp_path / "run", subject, memory=2**36)
    assert set(plan.how) == {"form", "fit", "paint"} and plan.estimate > 0


def test_a_missing_subject_and_missing_masks_are_reported_before_anything_runs(sd, subject, tmp_path):
    runner = Runner3D(sd)
    with pytest.raises(ValueError, match=r"need exactly one subject, but there are 0: give subject\.images"):
        runner.create(reconstruction(), tmp_path / "run", tensorboard=False)
    bare = {"mug": replace(subject["mug"], masks={})}
    with pytest.raises(
        ValueError, match=r"phases\.cameras crops the pictures .* needs masks, but .*\.png ha(s|ve) none"
    ):
        runner.create(reconstruction(), tmp_path / "run", bare, tensorboard=False)
    with pytest.raises(
        ValueError,
        match=r"near_deg must have one azimuth per picture \(3\), but has 1; give them in this order: 0\.png",
    ):
        runner.create(reconstruction("phases.cameras.task.near_deg=[0]"), tmp_path / "run", subject, tensorboard=False)
    assert not (tmp_path / "run").exists()


def test_a_rough_azimuth_is_refused_if_the_estimator_does_not_use_it():
    with pytest.raises(
        ValueError, match=r"near_deg narrows the search of estimator=renders, but estimator = toybox does not search"
    ):
        reconstruction("phases.cameras.task.near_deg=[0, 90, 180]", "phases.cameras.task.estimator=toybox")


def test_pictures_from_several_phases_are_compared_together_if_all_have_masks(tmp_path):
    folders = {"cameras": blank_views(turntable(3), tmp_path / "a"), "views": blank_views(turntable(2), tmp_path / "b")}
    entries = json.loads((folders["views"] / "kept.json").read_text())
    for entry in entries["kept"]:
        entry.pop("mask")
    (folders["views"] / "kept.json").write_text(json.dumps(entries))
    both = PhaseViews(phase=("cameras", "views", "cameras"), foreground=0.25)
    found = both.pictures({}, 16, folders)
    assert len(found.pixels) == len(found.cameras) == 8 and found.masks is not None and len(found.masks) == 8
    both.check({}, True, {"cameras": True, "views": False})
    with pytest.raises(
        ValueError, match=r"either all have masks or all lack them, but the views of the phase views have none"
    ):
        PhaseViews(phase=("cameras", "views")).check({}, False, {"cameras": True, "views": False})
    with pytest.raises(ValueError, match=r"needs masks .* references\.foreground=0\.25"):
        PhaseViews(phase="views").check({}, True, {"views": False})
    with pytest.raises(ValueError, match="unknown earlier phase that writes views 'view'"):
        PhaseViews(phase=("cameras", "view")).check({}, False, {"cameras": True, "views": True})
