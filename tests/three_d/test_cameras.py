"""Cameras have the right positions, axes and rays for any batch size, and match the toybox's cameras."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pcs_3d.cameras import FOV_DEG, Cameras, look_at_distance, turntable
from shared.toybox.splat import instances, projected
from shared.toybox.world import Camera, sample_scene


def random_cameras(count: int) -> Cameras:
    draw = torch.Generator().manual_seed(count)
    azimuth, elevation, roll = (torch.rand(count, generator=draw) * k for k in (360, 80, 30))
    return Cameras.of(azimuth, elevation, 3 + torch.rand(count, generator=draw), 40.0, roll)


def test_axes_are_orthonormal_and_do_not_depend_on_the_batch():
    cameras = random_cameras(3)
    assert torch.allclose(cameras.axes @ cameras.axes.mT, torch.eye(3).expand(3, 3, 3), atol=1e-6)
    assert torch.allclose(torch.linalg.det(cameras.axes), torch.ones(3), atol=1e-6)
    for i in range(3):
        one = cameras[i : i + 1]
        assert torch.equal(one.axes[0], cameras.axes[i]) and torch.equal(one.rays(4, 4)[1][0], cameras.rays(4, 4)[1][i])


def test_cameras_in_front_on_the_left_and_above_have_the_right_positions():
    positions = Cameras.of([0.0, 90.0, 0.0], torch.tensor([0.0, 0.0, 90.0]), 2.0).positions
    assert torch.allclose(positions, torch.tensor([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 2.0]]), atol=1e-6)


def test_rays_and_projection_agree():
    cameras = random_cameras(4)
    origins, directions = cameras.rays(8, 8)
    points = (origins + 3.3 * directions).reshape(4, -1, 3)
    places, depth = cameras.project(points)
    middles = (torch.arange(8) + 0.5) / 4 - 1
    expected = torch.stack([middles.expand(8, 8), -middles[:, None].expand(8, 8)], -1).reshape(1, -1, 2)
    assert torch.allclose(places, expected.expand(4, -1, -1), atol=1e-5) and bool((depth > 0).all())
    through_middle, _ = cameras.project(torch.zeros(1, 3))
    assert through_middle.abs().max() < 1e-5


def test_cameras_match_those_of_the_toybox():
    rng = np.random.default_rng(2)
    seen = Camera(azimuth_deg=37.0, elevation_deg=21.0, roll_deg=12.0, x=0.0, y=0.0, scale=1.0)
    things = instances([sample_scene(rng, camera=seen, two=False)], torch.device("cpu"))
    points = torch.from_numpy(rng.uniform(-0.6, 0.6, (50, 3))).float()
    columns, rows, depth = projected(points @ things.axes[0].T, things.place[0], 64)
    places, mine = Cameras.of([37.0], 21.0, roll_deg=12.0).project(points)
    expected = torch.stack([(columns + 0.5) / 32 - 1, 1 - (rows + 0.5) / 32], -1)
    assert torch.allclose(places[0], expected, atol=2e-3) and torch.allclose(mine[0], depth, atol=1e-4)
    assert look_at_distance(FOV_DEG) == pytest.approx(5.0, abs=0.01)


def test_degenerate_cameras_are_refused():
    for how, why in (
        ({"distance": 0.0}, "above 0"), ({"fov_deg": 180.0}, "between 0 and 180"), ({"elevation_deg": float("nan")}, "finite"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=why):
            Cameras.of([0.0], **how)
    assert len(turntable(7)) == 7
