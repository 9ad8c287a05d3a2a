"""Tests albums of held-out things, which come with masks and captions like a user's own pictures.

The captions name neither colours nor patterns.
"""

from __future__ import annotations

import torch

from shared.io.decode import read_picture
from shared.io.read_subject import read_subject
from shared.toybox import reference_sets as album
from shared.toybox.captions import plain_caption
from shared.toybox.evaluators.identity import cut, load_identity
from shared.toybox.render import render
from shared.toybox.subjects import reference_scenes
from shared.toybox.world import SEEDS, Camera, Scene, Thing


def test_an_album_has_a_caption_and_the_exact_mask_for_each_picture(tmp_path):
    files = album.write_album("development-mug", tmp_path / "mug")
    subject = read_subject(tmp_path / "mug", "mug")
    assert list(subject.images) == files and len(files) == 5
    scenes = reference_scenes(album.held_out("development-mug").thing, 5, 0)
    exact = render(scenes)
    for i, (path, scene) in enumerate(zip(files, scenes, strict=True)):
        mask = read_picture(subject.masks[path], min_side=1).pixels[:1] / 2 + 0.5
        assert torch.allclose(mask, exact.mask[i], atol=1 / 255)
        text = subject.captions[path]
        assert text == plain_caption(scene) and text.startswith("a photo of a mug "), (
            "captions name neither colour nor pattern"
        )
    assert album.shown_in(files).name == "development-mug"


def test_a_plain_caption_names_the_view_only_if_it_is_clear():
    thing = Thing("car", "red", "blue", SEEDS["development"].start)
    clear, between = (Scene((thing,), "snow", (Camera(azimuth),)) for azimuth in (90.0, 45.0))
    assert plain_caption(clear) == "a photo of a car in the snow, side view"
    assert plain_caption(between) == "a photo of a car in the snow"


def test_the_identity_encoder_crops_pictures_to_the_thing():
    """A small thing in a corner is located. The crop is centred on the thing, which then fills most of the picture."""
    thing = album.held_out("development-duck").thing
    corners = ((-0.25, 0.2), (0.25, -0.2))
    scenes = [Scene((thing,), "gray studio", (Camera(90.0, 15.0, 0.0, x, y, 0.5),)) for x, y in corners]
    rendered = render(scenes)
    squares = cut(rendered.mask, load_identity().locator.square(rendered.pixels))[:, 0]
    assert (squares.mean((1, 2)) > 2 * rendered.mask.mean((1, 2, 3))).all()
    side = (torch.arange(64) + 0.5) / 32 - 1
    for weights in (squares.sum(1), squares.sum(2)):
        assert ((weights * side).sum(1) / weights.sum(1)).abs().max() < 0.25
