"""Tests where regions are, which cells of a view show them, and how they are guided."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from pcs_3d.cameras import Cameras, turntable
from pcs_3d.guidance.oracle import OracleScores
from pcs_3d.guidance.regional_scores import RegionalScores
from pcs_3d.guidance.scores import Ask, Told
from pcs_3d.regions import Box, Sdf, ViewMask, seen
from pcs_3d.view_prompts import Views


def points() -> Tensor:
    return 1.2 * torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) - 0.6


def test_a_box_lies_between_its_corners_and_fades_in_at_its_faces():
    box = Box(lo=(-0.5, 0.0, 0.1), hi=(0.5, 0.4, 0.9), softness=0.1)
    asked = torch.tensor([[0.0, 0.2, 0.5], [0.0, 0.05, 0.5], [0.0, -1e-4, 0.5], [0.45, 0.2, 0.5], [0.0, 0.2, 0.95]])
    assert torch.allclose(box.build()(asked), torch.tensor([1.0, 0.5, 0.0, 0.5, 0.0]), atol=1e-5)
    with pytest.raises(ValueError, match=r"lo = \[0.0, 0.0, 1.0\] must be below hi"):
        Box(lo=(0, 0, 1), hi=(1, 1, 1))


def test_a_ball_has_the_given_centre_and_radius_and_can_be_grown():
    ball = Sdf(center=(0.3, -0.2, 0.1), radius=0.4, softness=0.0, grown=0.2)
    away = (points() - torch.tensor(ball.center)).norm(dim=-1)
    assert torch.equal(ball.build()(points()) > 0, away < 0.6)


def test_the_inside_of_a_mesh_is_a_region_at_the_given_position(tmp_path):
    """A 4 by 2 by 2 block is centred and scaled so that its corners lie on a sphere of radius 0.5."""
    trimesh.creation.box((4, 2, 2)).apply_translation([3, 0, 0]).export(tmp_path / "block.ply")
    mesh = Sdf(path=tmp_path / "block.ply", center=(0.1, -0.1, 0.0), radius=0.5, softness=0.0)
    half = 0.5 * torch.tensor([2.0, 1, 1]) / 6**0.5
    beyond = ((points() - torch.tensor(mesh.center)).abs() - half).amax(-1)
    sure = beyond.abs() > 0.03
    assert torch.equal((mesh.build()(points()) > 0)[sure], (beyond < 0)[sure])


def test_a_drawn_mask_selects_what_lies_behind_it_in_its_view(tmp_path):
    """The mask marks the left half of a view of the object's left side. The object's front is in that half."""
    drawn = np.zeros((40, 60), np.uint8)
    drawn[:, :30] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    at = points()
    mask = ViewMask(path=tmp_path / "mask.png", azimuth_deg=90, elevation_deg=0, softness=0, depth=(-2.0, 0.3))
    sure = at[:, 0].abs() > 0.05
    expected = (at[:, 0] > 0) & (at[:, 1] > -0.3)
    assert torch.equal((mask.build()(at) > 0.5)[sure], expected[sure])


@pytest.mark.parametrize("azimuth", [0.0, 90.0, 215.0])
def test_a_view_shows_a_region_where_rays_reach_it_before_the_object(azimuth):
    cameras, cells = Cameras.of([azimuth], 20.0), (16, 16)
    ball = Sdf(center=(0.3, 0.0, 0.2), radius=0.35, softness=0.0)
    origins, directions = cameras.rays(16, 16)
    to = torch.tensor(ball.center) - origins
    along = (to * directions).sum(-1)
    away = (to - along[..., None] * directions).norm(dim=-1)[0]
    far, clear = torch.full((1, 1, 32, 32), 99.0), torch.zeros(1, 1, 32, 32)
    shown = seen(ball.build(), cameras, far, clear, cells, 1.1)[0, 0]
    sure = (away - 0.35).abs() > 0.1  # half a cell's diagonal, plus the step along the ray
    assert torch.equal((shown > 0.5)[sure], (away < 0.35)[sure]) and bool((shown > 0.5).any())
    wall = torch.full((1, 1, 32, 32), float(along.min()) - 0.5)
    assert not bool(seen(ball.build(), cameras, wall, 1 - clear, cells, 1.1).any()), "the wall hides the region"
    behind = torch.full((1, 1, 32, 32), float(along.max()) + 0.5)
    assert torch.equal(seen(ball.build(), cameras, behind, 1 - clear, cells, 1.1)[0, 0], shown)
    half = seen(ball.build(), cameras, wall, 0.5 * (1 - clear), cells, 1.1)[0, 0]
    assert torch.allclose(half, 0.5 * shown), "a region behind a half-opaque object is half visible"


def constant(value: float) -> OracleScores:
    mean = lambda cameras: torch.full((len(cameras), 3, 4, 4), value)  # noqa: E731
    told: list[Told] = ["prompt", "negative", "null"]
    return OracleScores({t: (mean, 0.1 + 0.2 * i) for i, t in enumerate(told)})


def test_each_cell_is_guided_by_the_region_that_it_shows():
    whole, left, top = constant(0.0), constant(0.5), constant(-0.5)
    scores = RegionalScores(whole, {"left": left, "top": top})
    masks = {"left": torch.zeros(2, 1, 4, 4), "top": torch.zeros(2, 1, 4, 4)}
    masks["left"][:, :, :, :2], masks["top"][:1, :, :2], masks["left"][:, :, 3, 0] = 1.0, 1.0, 0.25
    views = Views(turntable(2), (False, False), regions=masks)
    z_t = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t, asks = torch.tensor([300, 300]), [Ask("prompt"), Ask("null"), Ask("prompt", "base"), Ask("negative")]
    found = scores.eps(asks, z_t, t, views)
    a, b, c = (s.eps(asks, z_t, t, views) for s in (whole, left, top))
    for i in (0, 3):
        assert torch.equal(found[i][:, :, 2:, 2:], a[i][:, :, 2:, 2:])
        assert torch.allclose(found[i][:, :, 2, :2], b[i][:, :, 2, :2])
        assert torch.allclose(found[i][0, :, :2, 2:], c[i][0, :, :2, 2:])
        assert torch.allclose(found[i][0, :, :2, :2], (b[i] + c[i])[0, :, :2, :2] / 2), (
            "overlapping regions share a cell equally"
        )
        assert torch.allclose(found[i][:, :, 3, 0], (0.75 * a[i] + 0.25 * b[i])[:, :, 3, 0])
    assert torch.equal(found[1], a[1]) and torch.equal(found[2], a[2]), (
        "unconditional and base predictions are unchanged"
    )


def test_a_region_that_no_view_shows_is_not_evaluated():
    asked = []

    class Watched(OracleScores):
        def eps(self, *told):
            asked.append(told)
            return super().eps(*told)

    hidden = {"hat": torch.zeros(1, 1, 4, 4)}
    watched = Watched({"prompt": (lambda c: torch.zeros(len(c), 3, 4, 4), 0.1)})
    whole, step = constant(0.5), ([Ask()], torch.zeros(1, 3, 4, 4), torch.tensor([5]))
    scores = RegionalScores(whole, {"hat": watched})
    views = Views(turntable(1), (False,), regions=hidden)
    assert torch.equal(scores.eps(*step, views)[0], whole.eps(*step, views)[0]) and not asked
    hidden["hat"][:] = 1
    assert not torch.equal(scores.eps(*step, views)[0], whole.eps(*step, views)[0]) and len(asked) == 1
