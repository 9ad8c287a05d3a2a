"""Tests the renderer (determinism, masks, positions, cameras, patterns and styles) and the data set on disk."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.pretrain.toybox import dataset
from shared.toybox import captions, styles, subjects, world
from shared.toybox.captioned_sheet import sheet
from shared.toybox.render import FAR, render
from shared.toybox.splat import DISTANCE, FILL
from shared.toybox.world import Camera, Scene, Thing

CAMERA = Camera(30, 15, 0, 0, 0.02, 0.9)


def one(name: str, background: str = "gray studio", camera: Camera = CAMERA, **more) -> Scene:
    identity = world.identity_of(0) if name == "face" else None
    fields = {"main": "red", "second": "blue", "identity": identity, **more}
    return Scene((Thing(name, **fields),), background, (camera,), seed=1)


def some(n: int, seed: int = 0, **fixed) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, **fixed) for _ in range(n)]


def test_shapes_and_ranges_are_correct_and_renders_are_deterministic():
    scenes = some(40)
    first, again = render(scenes), render(scenes)
    assert first.pixels.shape == (40, 3, 64, 64) and first.pixels.dtype == torch.float32
    assert first.mask.shape == first.depth.shape == (40, 1, 64, 64) and first.position.shape == (40, 3, 64, 64)
    assert first.thing_mask.shape == (40, 64, 64) and first.thing_mask.dtype == torch.int64
    for name in ("pixels", "mask", "thing_mask", "depth", "position"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert torch.isfinite(getattr(first, name).float()).all()
    assert first.pixels.min() >= 0 and first.pixels.max() <= 1
    assert ((first.mask == 0) == (first.depth == FAR)).all()
    assert set(first.thing_mask.unique().tolist()) == {0, 1, 2}


def test_a_picture_does_not_depend_on_the_rest_of_its_batch():
    scenes = some(7, seed=3)
    together = render(scenes).pixels
    assert torch.equal(together, torch.cat([render([s]).pixels for s in scenes]))


@pytest.mark.parametrize("name", world.CLASSES)
def test_positions_project_back_to_their_pixels(name):
    camera = Camera(130, 25, 12, -0.05, 0.04, 0.85)
    drawn = render([one(name, camera=camera, pattern_seed=None if name == "face" else 5)])
    inside = drawn.mask[0, 0] == 1
    # Pixels at inner edges average two surfaces, so only pixels on smooth surfaces are compared.
    depth = torch.nn.functional.pad(drawn.depth, (1, 1, 1, 1), value=FAR)
    spread = torch.nn.functional.max_pool2d(depth, 3, 1) + torch.nn.functional.max_pool2d(-depth, 3, 1)
    v, u = (inside & (spread[0, 0] < 0.1)).nonzero().unbind(1)
    assert len(v) > 200
    p = drawn.position[0][:, v, u].double().numpy()
    az, el, roll = np.radians([camera.azimuth_deg, camera.elevation_deg, camera.roll_deg])
    right = np.array([-np.sin(az), np.cos(az), 0])
    toward = np.array([np.cos(az) * np.cos(el), np.sin(az) * np.cos(el), np.sin(el)])
    up = np.cross(toward, right)
    far = DISTANCE - toward @ p
    zoom = FILL * camera.scale * DISTANCE / far
    a, b = right @ p * zoom, -(up @ p) * zoom
    x = 0.5 + camera.x + a * np.cos(roll) - b * np.sin(roll)
    y = 0.5 + camera.y + a * np.sin(roll) + b * np.cos(roll)
    assert np.abs(x * 64 - 0.5 - u.numpy()).max() < 1.2
    assert np.abs(y * 64 - 0.5 - v.numpy()).max() < 1.2
    assert np.abs(far - drawn.depth[0, 0][v, u].numpy()).max() < 0.05


@pytest.mark.parametrize("name", world.CLASSES)
def test_masks_have_no_holes(name):
    big = replace(CAMERA, scale=1.1)
    cameras = [replace(big, azimuth_deg=a, elevation_deg=e) for a in (0, 75, 150) for e in (0, 20, 70)]
    drawn = render([one(name, camera=c) for c in cameras])
    full = torch.nn.functional.avg_pool2d(drawn.mask, 3, 1, 1) * 9 - drawn.mask > 7.99
    depth = torch.where(drawn.mask > 0, drawn.depth, torch.full_like(drawn.depth, torch.nan)).nan_to_num(DISTANCE)
    pool = torch.nn.functional.max_pool2d
    flat = pool(depth, 3, 1, 1) + pool(-depth, 3, 1, 1) < 0.4
    # A hole is a pixel that is not fully covered although its neighbours on the same surface are. Gaps between parts do
    # not count.
    assert not ((drawn.mask < 1) & full & flat).any()


def test_the_front_view_and_the_back_view_show_opposite_halves():
    for name in world.CLASSES:
        views = [replace(CAMERA, azimuth_deg=a, elevation_deg=5) for a in (0, 180)]
        drawn = render([one(name, camera=c) for c in views])
        ahead = (drawn.position[:, 0] * drawn.mask[:, 0]).sum((1, 2)) / drawn.mask[:, 0].sum((1, 2))
        assert ahead[0] > 0.05 > -0.05 > ahead[1], name
        assert (drawn.pixels[0] - drawn.pixels[1]).abs().mean() > 0.01, name


def test_the_background_does_not_turn_with_the_camera():
    for background in world.BACKGROUNDS:
        turned = [one("mug", background, replace(CAMERA, azimuth_deg=a)) for a in (0, 40, 200)]
        drawn = render(turned)
        free = (torch.nn.functional.max_pool2d(drawn.mask, 21, 1, 10).amax(0) == 0)[0]
        # The contact shadow turns with the thing. Far from the shadow, nothing changes.
        free[40:] = False
        assert free.sum() > 200
        assert (drawn.pixels[:, :, free] - drawn.pixels[:1, :, free]).abs().max() < 0.02, background


def test_all_backgrounds_look_different():
    empty = [one("rocket", b, replace(CAMERA, scale=0.4)) for b in world.BACKGROUNDS]
    means = torch.nn.functional.avg_pool2d(render(empty).pixels, 16).flatten(1)
    gaps = torch.cdist(means, means) + 10 * torch.eye(len(means))
    assert gaps.min() > 0.25


@pytest.mark.parametrize("background", ["white studio", "black studio", "snow", "night sky"])
def test_things_stand_out_from_a_background_of_a_similar_colour(background):
    color = "black" if background in ("black studio", "night sky") else "white"
    other = "white" if color == "black" else "black"
    for name in ("duck", "mug", "cat", "boot"):
        scene = one(name, background, main=color, second=other)
        drawn = render([scene])
        bare = render([replace(scene, cameras=(replace(CAMERA, x=3.0),))])
        inside = drawn.mask[0, 0] == 1
        assert (drawn.pixels - bare.pixels).abs().mean(1)[0][inside].mean() > 0.04, name


def test_the_main_colour_dominates_even_with_patterns():
    for seed in range(24):
        name = [c for c in world.CLASSES if c != "face"][seed % 12]
        plain, patterned = render([one(name), one(name, pattern_seed=None)]), render([one(name, pattern_seed=seed)])
        hue = patterned.pixels[0].argmax(0)[patterned.mask[0, 0] == 1]
        assert plain.pixels.shape[0] == 2 and (hue == 0).float().mean() > 0.2, (name, seed)


def test_patterns_are_visible_from_every_view():
    views = [Camera(a, e, 0, 0, 0.02, 0.95) for a, e in ((0, 10), (90, 10), (180, 10), (270, 10), (20, 60))]
    for held in subjects.subjects("development") + subjects.subjects("reporting"):
        scenes = [Scene((held.thing,), "gray studio", (c,)) for c in views]
        flat = [replace(s, things=(replace(held.thing, pattern_seed=None),)) for s in scenes]
        drawn, bare = render(scenes), render(flat)
        both = (drawn.mask == 1) & (bare.mask == 1)
        change = ((drawn.pixels - bare.pixels).abs().amax(1, keepdim=True) > 0.15) & both
        assert (change.sum((1, 2, 3)) / both.sum((1, 2, 3))).min() > 0.04, held.name


def test_accessories_are_visible():
    for name in world.CLASSES:
        for accessory in world.ACCESSORIES[1:]:
            scene = one(name)
            worn = replace(scene, things=(replace(scene.things[0], accessory=accessory),))
            drawn = render([scene, worn]).pixels
            changed = ((drawn[0] - drawn[1]).abs().amax(0) > 0.2).sum()
            assert changed > 25, (name, accessory)


def test_styles_change_the_picture_and_unknown_styles_are_refused():
    scene = one("duck", "beach")
    photo = render([scene]).pixels
    for style in styles.DRAWERS:
        assert (render([replace(scene, style=style)]).pixels - photo).abs().mean() > 0.03, style
    with pytest.raises(ValueError, match="no style 'fresco'"):
        render([replace(scene, style="fresco")])


def test_two_things_have_separate_masks_from_left_to_right():
    scenes = some(12, seed=4, two=True)
    drawn = render(scenes)
    for index in range(12):
        left, right = ((drawn.thing_mask[index] == k).nonzero()[:, 1].float() for k in (1, 2))
        assert len(left) > 100 and len(right) > 100 and left.mean() < right.mean()


def test_a_larger_render_shows_the_same_picture():
    scenes = some(4, seed=6, style="photo")
    small, large = render(scenes), render(scenes, size=128)
    assert large.pixels.shape == (4, 3, 128, 128)
    assert (torch.nn.functional.avg_pool2d(large.pixels, 2) - small.pixels).abs().mean() < 0.02


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_renders_the_same_pictures():
    scenes = some(32)
    on_cpu, on_gpu = render(scenes), render(scenes, device="cuda")
    assert (on_cpu.pixels - on_gpu.pixels.cpu()).abs().mean() < 2e-3
    assert (on_cpu.mask - on_gpu.mask.cpu()).abs().mean() < 2e-3


def test_missing_chunks_of_a_data_set_are_rebuilt_and_scenes_do_not_depend_on_the_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "CHUNK", 6)
    made = dataset.build(tmp_path / "a", 15, 3)
    assert len(made) == 15 and made.pixels([0, 14]).shape == (2, 64, 64, 3) and made.pixels([0]).dtype == np.uint8
    scene, rng = dataset.scene_of(3, 13)
    drawn = render([scene])
    assert np.array_equal(made.pixels([13])[0], (drawn.pixels[0] * 255).round().byte().permute(1, 2, 0).numpy())
    assert np.array_equal(made.masks([13])[0], drawn.mask[0, 0].numpy() >= 0.5)
    assert made.captions[13] == [captions.caption(scene, rng) for _ in range(4)]
    assert [made.labels[k][13] for k in dataset.LABELS] == dataset.labels_of(scene)
    lost = tmp_path / "a" / "chunk-00001.captions.jsonl"
    lost.unlink()
    with pytest.raises(ValueError, match="lacks 1 of 3 chunks"):
        dataset.load(tmp_path / "a")
    again = dataset.build(tmp_path / "a", 15, 3)
    assert np.array_equal(again.pixels(slice(None)), made.pixels(slice(None))) and again.captions == made.captions
    with pytest.raises(ValueError, match="a different data set"):
        dataset.build(tmp_path / "a", 16, 3)
    with pytest.raises(ValueError, match="no toybox data set"):
        dataset.load(tmp_path / "b")


def test_a_sheet_arranges_pictures_in_columns_with_one_caption_each():
    page = sheet(torch.rand(5, 3, 8, 8), 3, captions=["a", "b", "c", "d", "e"])
    assert page.width == 3 * 18 + 2 and page.height > 2 * 18
    with pytest.raises(ValueError, match="2 captions for 5"):
        sheet(torch.rand(5, 3, 8, 8), 3, captions=["a", "b"])
