"""Tests the normals and part colours of the surfaces visible in a picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.toybox import world
from shared.toybox.part_colors import SLOTS
from shared.toybox.render import render
from shared.toybox.splat import groups, instances, turned, visible
from shared.toybox.surfaces import SPACING, HitImage, halved

SIDE = 128
CAMERA = world.Camera(35, 20, 0, 0, 0, 1.0)


def hits(thing: world.Thing) -> tuple[world.Scene, HitImage, Tensor]:
    """Returns a scene, its hits at 2 SIDE × 2 SIDE subpixels, and their normals in camera coordinates (`[M, 3]`)."""
    scene, cpu = world.Scene((thing,), "gray studio", (CAMERA,)), torch.device("cpu")
    things = instances([scene], cpu)
    seen = visible(things, groups(things, SPACING * 64 / SIDE, cpu), 1, 2 * SIDE)
    return scene, HitImage(seen, 1, 2 * SIDE), turned(things.axes, seen.who, seen.normal)


def inside(mask: Tensor, by: int) -> Tensor:
    """Erodes a mask (`[S, S]`) by `by` pixels. A pixel stays set only if every pixel within that distance is set."""
    return -F.max_pool2d(-mask.float()[None, None], 2 * by + 1, 1, by)[0, 0] == 1


def test_rendering_without_scenes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one scene"):
        render([])


def test_parts_have_the_colours_that_the_picture_shows() -> None:
    scene, image, _ = hits(world.Thing("duck", "blue", "red"))
    pixels = render([scene], SIDE).pixels[0]
    slot = image.scatter(image.hits.slot[:, None], -1)[0, 0, ::2, ::2]
    body, beak = inside(slot == SLOTS["main"], 2), inside(slot == SLOTS["orange"], 1)
    assert body.sum() > 400 and (pixels[:, body].argmax(0) == 2).all()
    assert beak.any() and (pixels[0, beak].mean() > pixels[2, beak].mean() + 0.2)


def test_normals_match_the_surface_formed_by_the_positions() -> None:
    _, image, normals = hits(world.Thing("bear", "blue", "red"))
    az, el = np.radians([CAMERA.azimuth_deg, CAMERA.elevation_deg])
    right = np.array([-np.sin(az), np.cos(az), 0])
    toward = np.array([np.cos(az) * np.cos(el), np.sin(az) * np.cos(el), np.sin(el)])
    axes = torch.tensor(np.stack([right, np.cross(toward, right), toward]), dtype=torch.float32)
    cover, position = (halved(image.scatter(x)) for x in (torch.ones(len(normals), 1), image.hits.position))
    at = torch.einsum("ij,jyx->iyx", axes, position[0])
    across, down = at[:, 1:-1, 2:] - at[:, 1:-1, :-2], at[:, 2:, 1:-1] - at[:, :-2, 1:-1]
    expected = F.normalize(torch.cross(down, across, dim=0), dim=0)
    whole = inside(cover[0, 0] == 1, 2)[1:-1, 1:-1]
    cosine = (F.normalize(halved(image.scatter(normals))[0, :, 1:-1, 1:-1], dim=0) * expected).sum(0)[whole]
    assert whole.sum() > 1000 and cosine.median() > 0.97
