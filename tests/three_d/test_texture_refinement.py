"""The last phase of texture refinement learns colours from generated pictures, without a teacher.

The pictures are generated from renders of the asset.
"""

from __future__ import annotations

import pytest
import torch

from pcs_3d.distill.distill import Distill
from pcs_3d.distill.distill_task import DistillTask
from pcs_3d.distill.hand_over import FIELD
from pcs_3d.recipe import Recipe3D
from pcs_3d.references import PhaseViews
from pcs_3d.runner import Runner3D
from shared.io.contact_sheets import write_picture
from shared.io.outputs import write_text
from shared.recipe.resolve import load
from shared.sources.phase_pictures import KEPT

SMALL = ("backbone=tiny", "prompt=a photo of a mug", "setting=", "train.mixed_precision=no", "train.checkpoint_every=0",
         "guidance.resolution=32", "sampling.steps=4", "phases.form.field.resolution=12", "phases.form.renderer.samples=16",
         "phases.views.task.num=2", "phases.views.train.resolution=32", "phases.paint.field.resolution=8",
         "phases.paint.field.start.resolution=16", "phases.paint.field.start.faces=100",
         *(f"phases.{p}.train={{steps: 2, batch_size: 1, resolution: 16}}" for p in ("form", "paint")))  # fmt: skip


def test_the_last_phase_paints_the_shape_from_pictures_without_a_teacher(sd, tmp_path):
    """The recipe learns no subject. The generated pictures depend on the prompt and on loaded concepts."""
    asked: dict[str, list[int]] = {}

    class Counted(Distill):
        def __init__(self, context):
            super().__init__(context)
            eps, calls = self.scores.eps, asked.setdefault(context.name, [])
            self.scores.eps = lambda *told: calls.append(1) or eps(*told)  # type: ignore[method-assign]

    runner = Runner3D(sd)
    runner.tasks = {**runner.tasks, DistillTask: Counted}  # type: ignore[misc]
    asset = runner.create(load("texture_refinement", list(SMALL), "3d", Recipe3D), tmp_path / "run", tensorboard=False)
    assert len(asked["form"]) == 2 and asked["paint"] == []
    views = sorted(p.name for p in (tmp_path / "run" / "phases" / "views").glob("*.png"))
    assert views == ["asset-000-0000.png", "asset-000-0001.png"]
    assert asset.recipe.field.kind == "textured_mesh"
    assert {key.removeprefix(FIELD) for key in asset.field.state_dict()} == {"faces", "vertices", "raw_features"}


def test_pixels_that_differ_from_the_border_colour_count_as_the_object(tmp_path):
    pixels = torch.full((3, 16, 16), 0.8)
    pixels[:, 4:12, 6:10] = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    write_picture(pixels, tmp_path / "a.png", {})
    entry = '{"file": "a.png", "owner": "asset", "caption": "", "azimuth_deg": 0, "elevation_deg": 0, "distance": 5,'
    entry += ' "fov_deg": 24, "roll_deg": 0, "centre": [0, 0, 0]}'
    write_text(tmp_path / KEPT, f'{{"phase": "views", "key": "", "kept": [{entry}]}}')
    (mask,) = PhaseViews(phase="views", foreground=0.2).pictures({}, 16, {"views": tmp_path}).masks  # type: ignore[misc]
    assert bool((mask[0, 5:11, 7:9] == 1).all()) and bool((mask[0, :3] == 0).all()) and 0 < mask[0, 4, 6] < 1
    assert PhaseViews(phase="views").pictures({}, 16, {"views": tmp_path}).masks is None


def test_phases_that_use_views_from_earlier_phases_can_be_fitted_into_memory(sd, tmp_path):
    plan = Runner3D(sd).fit(load("texture_refinement", list(SMALL), "3d", Recipe3D), tmp_path / "run", memory=2**36)
    assert set(plan.how) == {"form", "paint"} and plan.estimate > 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        (
            ["phases.views.task.prompts=['a photo of a {concept}']"],
            "stands for the learned subject, but no subject is learned",
        ),
        (["phases.paint.penalties.reference_views=null"], "nothing trains the field"),
        (
            ["phases.views.task.strength=0.1"],
            r"phases\.views\.task\.strength = 0\.1 leaves none of the 4 denoising steps",
        ),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(sd, tmp_path, settings, why):
    with pytest.raises(ValueError, match=why):
        recipe = load("texture_refinement", [*SMALL, *settings], "3d", Recipe3D)
        Runner3D(sd).create(recipe, tmp_path / "run", tensorboard=False)
