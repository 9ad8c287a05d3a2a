"""The flow of toybox clips matches closed forms, their frames match rendered pictures, and captions name the motion."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from shared.toybox import captions
from shared.toybox.motions.captioned import CAMERA_MOTIONS, MOTIONS
from shared.toybox.motions.clip_captions import PHRASES, clip_caption, motion_phrase, plain_clip_caption
from shared.toybox.motions.clips import Clip, MovingScene, draw_clip, sample_moving
from shared.toybox.motions.held_out import motion_names
from shared.toybox.motions.motion import Motion, still
from shared.toybox.render import render
from shared.toybox.tokenizer import MAX_LENGTH
from shared.toybox.weights import backbone_path
from shared.toybox.world import BACKGROUNDS, Scene, Thing

CAR = Thing("car", "red", "blue", 7)
PLACED = np.array([0.0, 0.02, np.log(0.7), 30.0, 15.0, 0.0])
NO_MOTION = Motion("made", lambda t, p: {})


def clip(
    frames: int = 3, pan: float = 0.0, background: str = "gray studio", scale: float = 0.7, **moved: float
) -> Clip:
    """Draws a clip of a car. The path's parameters change linearly by the amounts in `moved`."""
    path = still(frames) + PLACED
    path[:, 2] = np.log(scale)
    for name, value in moved.items():
        path[:, ["x", "y", "log_scale", "azimuth_deg", "elevation_deg", "roll_deg"].index(name)] += np.linspace(
            0, value, frames
        )
    scene = Scene((CAR,), background, (), "photo", 3)
    return draw_clip(MovingScene(scene, NO_MOTION, path, np.linspace(0, pan, frames)))


def centres(drawn: Clip) -> Tensor:
    """Returns the position of each pixel relative to the thing's centre, in pixels (`[F-1, H, W, 2]`)."""
    step = torch.arange(drawn.mask.shape[-1]) + 0.5
    y, x = torch.meshgrid(step, step, indexing="ij")
    middle = torch.tensor(drawn.path[:-1, :2]).float() * 64 + 32
    return torch.stack([x, y], -1) - middle[:, None, None]


def inside(drawn: Clip) -> Tensor:
    return drawn.flow_known & (drawn.mask[:-1] == 1)


def warped(values: Tensor, flow: Tensor) -> Tensor:
    """Samples the next frames' `values` (`[F-1, C, H, W]`) at the points to which `flow` (`[F-1, H, W, 2]`) leads."""
    step = torch.arange(flow.shape[1]) + 0.5
    y, x = torch.meshgrid(step, step, indexing="ij")
    at = (torch.stack([x, y], -1) + flow) / (flow.shape[1] / 2) - 1
    return torch.nn.functional.grid_sample(values, at, align_corners=False, padding_mode="border")


def test_a_sliding_thing_has_the_same_flow_everywhere() -> None:
    drawn = clip(x=0.2, y=-0.1)
    known = inside(drawn)
    assert known[0].sum() > 300
    assert torch.allclose(drawn.flow[known], torch.tensor([6.4, -3.2]), atol=1e-4)
    assert (drawn.flow[drawn.mask[:-1] == 0] == 0).all(), "the background does not move"


def test_flow_of_scaling_and_rolling_matches_the_2d_formula() -> None:
    """A visible point is up to half a pixel from its pixel's centre.

    The flow may therefore deviate from the formula by that distance times the flow's slope.
    """
    grown, at = clip(log_scale=0.4), None
    at = centres(grown)
    factor = np.exp(0.2) - 1
    assert (grown.flow - at * factor)[inside(grown)].abs().max() < 0.6 * factor + 0.01
    rolled = clip(roll_deg=30.0)
    turn = np.radians(15)
    spin = torch.tensor([[np.cos(turn) - 1, np.sin(turn)], [-np.sin(turn), np.cos(turn) - 1]]).float()
    assert (rolled.flow - at @ spin)[inside(rolled)].abs().max() < 0.9 * turn, (
        "the rotation is clockwise, because y points down"
    )


def test_flow_of_a_turning_thing_leads_to_the_same_point_on_its_surface() -> None:
    """Compares the flow with `render`, which returns the surface point that each pixel shows."""
    moving = sample_moving(np.random.default_rng(0), MOTIONS["orbit"], 6, thing=CAR, style="photo", background="beach")
    drawn, pictures = draw_clip(moving), render(moving.scenes())
    assert torch.equal(drawn.mask, pictures.mask[:, 0])
    assert torch.allclose(drawn.frames, pictures.pixels.permute(0, 2, 3, 1), atol=1e-6), (
        "each frame equals the rendered picture"
    )
    known = inside(drawn)
    assert known.sum() > 0.5 * (drawn.mask[:-1] == 1).sum()
    gap = (warped(pictures.position[1:], drawn.flow) - pictures.position[:-1]).norm(dim=1)[known]
    still_gap = (pictures.position[1:] - pictures.position[:-1]).norm(dim=1)[known]
    assert gap.median() < 0.02 and gap.quantile(0.95) < 0.09 < still_gap.quantile(0.95)


@pytest.mark.parametrize("name", ["slide left", "spin", "approach", "development-pendulum"])
def test_warping_the_next_frame_by_the_flow_restores_this_frame(name: str) -> None:
    motion = {**MOTIONS, **motion_names()}[name]
    moving = sample_moving(np.random.default_rng(1), motion, 12, thing=CAR, style="photo", background="gray studio")
    drawn = draw_clip(moving)
    known, frames = inside(drawn), drawn.frames.permute(0, 3, 1, 2)
    back = (warped(frames[1:], drawn.flow) - frames[:-1]).abs().mean(1)[known].mean()
    plain = (frames[1:] - frames[:-1]).abs().mean(1)[known].mean()
    assert back < 0.08 and back < 0.6 * plain, "only shading and pixels that mix several points differ"


def test_flow_is_unknown_where_the_next_frame_hides_the_point() -> None:
    drawn = clip(frames=2, azimuth_deg=85.0)
    share = inside(drawn).sum() / (drawn.mask[:-1] == 1).sum()
    assert 0.05 < share < 0.7, "a side of the car has turned away"
    slid = clip(frames=2, x=0.3)
    covered = (slid.mask[1] == 1) & (slid.mask[0] == 0)
    assert covered.any() and not slid.flow_known[0][covered].any(), "the car now covers the background there"
    edge = (slid.mask[0] > 0) & (slid.mask[0] < 1)
    assert not slid.flow_known[0][edge].any(), "edge pixels mix the thing and the background"


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_only_the_camera_moves_the_background(background: str) -> None:
    """Far from the thing and its shadow, nothing changes unless the camera pans.

    If it pans, all of the background shifts by the same whole number of pixels.
    """
    kept = clip(frames=2, scale=0.35, background=background, azimuth_deg=50.0, roll_deg=10.0)
    assert torch.equal(kept.frames[0, :, :6], kept.frames[1, :, :6])
    panned = clip(frames=2, scale=0.35, pan=0.125, background=background)
    assert torch.allclose(panned.flow[0][panned.mask[0] == 0], torch.tensor([8.0, 0.0]))
    free = panned.flow_known[0] & (panned.mask[0] == 0)
    free[:, 8:] = False  # excludes the thing's shadow
    back = (warped(panned.frames[1:].permute(0, 3, 1, 2), panned.flow) - panned.frames[:1].permute(0, 3, 1, 2)).abs()
    assert free.any() and back.mean(1)[0][free].max() < 0.02
    assert not panned.flow_known[0, :, 56:].any(), "these pixels leave the picture"


def test_a_sampled_clip_shows_one_thing_in_front_of_one_background() -> None:
    rng = np.random.default_rng(2)
    for name, motion in MOTIONS.items():
        moving = sample_moving(rng, motion, 8)
        scenes = moving.scenes()
        assert len(scenes) == 8 and len({(s.things, s.background, s.style, s.seed) for s in scenes}) == 1
        assert scenes[0].cameras == moving.scene.cameras and (len({s.pan for s in scenes}) > 1) == (
            name in CAMERA_MOTIONS
        )
        assert name not in CAMERA_MOTIONS or "studio" not in moving.scene.background, (
            "a camera move would be invisible in a studio"
        )
    one, other = (sample_moving(np.random.default_rng(5), frames=3) for _ in range(2))
    drawn = draw_clip(one)
    assert torch.equal(drawn.frames, draw_clip(other).frames)
    assert drawn.levels.dtype == torch.uint8 and drawn.levels.shape == (3, 64, 64, 3)
    with pytest.raises(
        ValueError, match="cannot fix camera, view: a clip has one thing, and its motion sets the camera"
    ):
        sample_moving(rng, view="side", camera=None)


def test_captions_name_the_motion_and_stay_within_the_token_limit() -> None:
    shipped = CLIPTokenizer.from_pretrained(str(backbone_path() / "tokenizer"))
    rng = np.random.default_rng(6)
    long = Thing("face", "purple", "yellow", None, "rainbow scarf", tuple([0.0] * 16))
    met: dict[str, set[str]] = {name: set() for name in MOTIONS}
    for name, motion in MOTIONS.items():
        moving = sample_moving(rng, motion, 4, thing=long, style="watercolor painting", background="mountain")
        texts = [clip_caption(moving, rng, full=True), *(clip_caption(moving, rng) for _ in range(60))]
        assert max(len(shipped(text)["input_ids"]) for text in texts) <= MAX_LENGTH
        assert motion_phrase(name) in texts[0] and "mountain" in texts[0], (
            "the full caption contains the canonical phrase and the background"
        )
        for text in texts:
            said = {m for m, options in PHRASES.items() if any(re.search(rf"{o}\b(?! it)", text) for o in options)}
            assert said == {name}, text
            met[name] |= {o for o in PHRASES[name] if o in text}
    assert all(met[name] == set(PHRASES[name]) for name in MOTIONS), "every wording is used"


def test_captions_name_the_view_only_if_it_does_not_change() -> None:
    rng = np.random.default_rng(7)
    path = still(4) + np.array([0, 0, 0, 90.0, 10.0, 0])
    scene = Scene((CAR,), "water", sample_moving(rng, frames=2).scene.cameras, "photo", 1)
    slid = MovingScene(scene, MOTIONS["slide left"], path, np.zeros(4))
    slid = replace(slid, scene=slid.scenes()[0])
    assert clip_caption(slid, rng, True) == (
        "a photo of a red car with a blue roof moving to the left on the water, side view"
    ), "a moving thing is also described as being on the water"
    path = path.copy()
    path[:, 3] += np.linspace(0, 300, 4)
    assert clip_caption(replace(slid, motion=MOTIONS["spin"], path=path), rng, True).endswith("spinning on the water")


def test_captions_of_held_out_motions_do_not_describe_the_motion() -> None:
    rng, words = np.random.default_rng(8), set(captions.vocabulary())
    for motion in motion_names().values():
        moving = sample_moving(rng, motion, 4)
        for text in (clip_caption(moving, rng), clip_caption(moving, rng, True), plain_clip_caption(moving)):
            assert set(text.replace(",", " ,").split()) <= words, "only the vocabulary of still pictures is used"
