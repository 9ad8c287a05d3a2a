"""Tests the cameras and backgrounds of views, and the prompts that the teacher gets for them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from pcs_3d.backgrounds import Backgrounds
from pcs_3d.camera_sampling import CameraSampling, moved
from pcs_3d.cameras import Cameras
from pcs_3d.guidance.backbone_scores import BackboneScores
from pcs_3d.guidance.engine import guide
from pcs_3d.guidance.oracle import OracleScores
from pcs_3d.guidance.perp_neg import PerpNeg, perpendicular
from pcs_3d.guidance.scores import Ask, Told
from pcs_3d.guidance.settings import Guidance
from pcs_3d.schedules import Moment
from pcs_3d.shadings import Shadings
from pcs_3d.view_prompts import ScenePrompts, Views, ViewWords
from shared.train.loop import generator
from tests.three_d.test_guidance import looked, means, random, shipped

NOW = Moment(5, 10)


def sampled(count: int, moment: Moment = NOW, seed: int = 0, **settings) -> Cameras:
    return CameraSampling(**settings).sample(count, moment, generator(seed, 1))


# --- cameras ---------------------------------------------------------------------------------


def test_azimuths_are_spread_over_the_batch():
    cameras = sampled(8)
    parts = ((cameras.azimuth_deg + 180) / 45).floor().sort().values
    assert parts.tolist() == list(range(8))


def test_half_of_the_elevations_are_uniform_in_angle_and_half_are_uniform_on_the_sphere():
    cameras = sampled(20_000, elevation_deg=(0.0, 90.0))
    above_60 = float((cameras.elevation_deg > 60).float().mean())
    on_sphere = 1 - torch.deg2rad(torch.tensor(60.0)).sin()
    assert above_60 == pytest.approx(float(0.5 / 3 + 0.5 * on_sphere), abs=0.01)
    assert float(cameras.elevation_deg.min()) >= 0 and float(cameras.elevation_deg.max()) <= 90


def test_the_distance_follows_from_the_share_of_the_view_that_the_object_fills():
    cameras = sampled(64, fov_deg=(30.0, 60.0), fill=(0.5, 0.8))
    fill = 1 / (cameras.distance * torch.tan(torch.deg2rad(cameras.fov_deg) / 2))
    assert 0.5 <= float(fill.min()) < 0.55 and 0.75 < float(fill.max()) <= 0.8001
    assert sampled(2, distance=(3.0, 3.0)).distance.tolist() == [3.0, 3.0]


def test_camera_ranges_grow_from_the_front_view():
    how = {"grown": [0, 0.0, 1.0, 10], "elevation_deg": (0.0, 60.0)}
    first, half = sampled(4, Moment(0, 10), **how), sampled(512, Moment(5, 10), **how)
    assert first.azimuth_deg.abs().max() == 0 and first.elevation_deg.tolist() == pytest.approx([15.0] * 4)
    assert 85 < float(half.azimuth_deg.abs().max()) <= 90 and float(half.elevation_deg.max()) <= 15 + 22.5 + 1e-4


def test_the_cameras_of_a_ring_differ_only_in_azimuth():
    cameras = sampled(8, ring=4, jitter=0.2, look_at=0.1)
    for ring in (cameras[:4], cameras[4:]):
        assert len(set(ring.elevation_deg.tolist())) == len(set(ring.distance.tolist())) == 1
        turns = (ring.azimuth_deg - ring.azimuth_deg[0]) % 360
        assert torch.allclose(turns, torch.tensor([0.0, 90, 180, 270]), atol=1e-3)
    with pytest.raises(ValueError, match="must be a multiple of cameras.ring = 4"):
        sampled(6, ring=4)


def test_jitter_moves_the_camera_but_not_its_target():
    cameras = Cameras.of([30.0, -120.0], 20.0, 4.0, centre=torch.tensor([0.1, 0.0, -0.2]))
    shift = torch.tensor([[0.3, -0.1, 0.2], [0.0, 0.0, 0.0]])
    there = moved(cameras, shift)
    assert torch.allclose(there.positions, cameras.positions + shift, atol=1e-5)
    assert torch.equal(there.centre, cameras.centre) and torch.equal(there.azimuth_deg[1:], cameras.azimuth_deg[1:])


def test_cameras_are_reproducible_and_degenerate_ranges_are_refused():
    assert torch.equal(sampled(3).positions, sampled(3).positions)
    assert not torch.equal(sampled(3).positions, sampled(3, seed=1).positions)
    degenerate = (
        {"elevation_deg": (50.0, 20.0)},
        {"elevation_deg": (0.0, 91.0)},
        {"fov_deg": (0.0, 40.0)},
        {"fill": (0.0, 1.0)},
    )
    for wrong in degenerate:
        with pytest.raises(ValueError):
            CameraSampling(**wrong)


def test_backgrounds_and_shadings_are_drawn_in_the_given_proportions():
    colors = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    drawn = Backgrounds(colors=colors, random=0.25).draw(4000, 3, generator(0, 0))
    stated = ((drawn == 1).all(1) | (drawn == 0).all(1)).float().mean()
    assert drawn.shape == (4000, 3, 1, 1) and float(stated) == pytest.approx(0.75, abs=0.03)
    one = Backgrounds(same=True, random=1.0).draw(3, 3, generator(0, 0))
    assert torch.equal(one[0], one[2]) and not Backgrounds().draw(2, 4, generator(0, 0)).any()
    later = Shadings(lambertian=[0, 0.0, 1.0, 5], ambient=[0, 1.0, 0.0, 5])
    cameras = sampled(3)
    assert later.draw(cameras, Moment(0, 10), generator(0, 0))[0] == "albedo"
    shading, light = later.draw(cameras, Moment(5, 10), generator(0, 0))
    assert shading == "lambertian" and light.shape == (3, 3)
    with pytest.raises(ValueError, match="not valid proportions"):
        Shadings(ambient=0.0).draw(cameras, NOW, generator(0, 0))


# --- the teacher's prompts -------------------------------------------------------------------


def test_the_words_for_a_view_match_its_camera_and_follow_the_subjects_name():
    words = ViewWords(back="seen from behind")
    cameras = Cameras.of([0.0, 44.0, 46.0, -134.0, 136.0, 180.0, 10.0], torch.tensor([0.0] * 6 + [61.0]))
    assert words.directions(cameras) == ["front", "front", "side", "side", "back", "back", "overhead"]
    assert words.said("a photo of a <my-mug> on a table", "side") == "a photo of a <my-mug>, side view, on a table"
    assert words.said("a photo of a <my-mug>", "back") == "a photo of a <my-mug>, seen from behind"
    assert words.said("a mug on a table", "front") == "a mug on a table, front view"
    at_end = ViewWords(place="end")
    assert at_end.said("a <my-mug> on a table", "overhead") == "a <my-mug> on a table, overhead view"
    assert words.said("the {view} of a <mug>", "side") == "the side view of a <mug>"
    assert words.said("the {view} of a <mug>", None) == "the of a <mug>"


def test_the_prompts_for_some_back_views_name_only_the_class():
    words = ViewWords(drop_subject=0.5)
    prompts = ScenePrompts("a <my-mug>", words=words, class_nouns={"my-mug": "mug"})
    cameras = Cameras.of([0.0, 180.0] * 200, 0.0)
    views = prompts.views(cameras, generator(0, 0))
    texts = [row[0][1] for row in prompts.rows("prompt", views)]
    assert set(texts[::2]) == {"a <my-mug>, front view"}
    assert 70 < texts[1::2].count("a mug, back view") < 130 and "a <my-mug>, back view" in texts


# --- Perp-Neg --------------------------------------------------------------------------------


def test_the_perpendicular_component_is_perpendicular():
    e, to = random(3, 4, 5, 5, seed=1), random(3, 4, 5, 5, seed=2)
    left = perpendicular(e, to)
    assert (left * to).flatten(1).sum(1).abs().max() < 1e-12
    assert torch.allclose(perpendicular(left, to), left) and perpendicular(to, to).abs().max() < 1e-12


def perp_negs(settings: Guidance, moment: Moment):
    """Returns a guided prediction, a function that returns single predictions, and the sum of w_i perp(e_i, e_pos)."""
    scene = {
        "prompt": (means(1), 0.1),
        "negative": (means(3), 0.5),
        "null": (means(4), 0.9),
        "away_near": (means(5), 0.3),
        "away_far": (means(6), 0.3),
    }
    scores = OracleScores(scene)  # type: ignore[arg-type]
    views, prompts = looked(20.0, 130.0), ScenePrompts("a mug")
    made = guide(settings, scores, random(2, 3, 4, 4, seed=9), views, prompts, moment, generator(0, 0))
    ask = lambda told: scores.eps([Ask(told)], made.noised.z_t, made.noised.t, views)[0]  # noqa: E731
    weights = PerpNeg().weights(prompts, views.cameras).double()
    assert (weights <= 0).all() and (weights < 0).any(1).all()
    away = sum(
        weights[:, i, None, None, None] * perpendicular(ask(told) - ask("null"), ask("prompt") - ask("null"))
        for i, told in enumerate(("away_near", "away_far"))
    )
    return made, ask, away


def test_perp_neg_equals_its_formula_for_every_view():
    settings = shipped("dreamfusion", "guidance.perp_neg={}", "guidance.terms.null={plain: 1.0, scaled: -1.0}",
                       "guidance.terms.negative=null", "guidance.scale=7.5")  # fmt: skip
    made, ask, away = perp_negs(settings, NOW)
    assert torch.allclose(made.eps, ask("null") + 7.5 * (ask("prompt") - ask("null") + away), rtol=1e-9)


def test_perp_neg_scales_the_negatives_like_the_prompt():
    """In CSD, the prompt's coefficient is 1, whatever the guidance scale."""
    for settings, factor in (([], 1.0), (["guidance.terms.prompt.plain=2"], 2.0)):
        made, ask, away = perp_negs(shipped("csd", "guidance.perp_neg={}", *settings), Moment(0, 10))
        assert torch.allclose(made.eps, factor * (ask("prompt") + away) - ask("null"), rtol=1e-9)
    early = shipped("csd", "guidance.perp_neg={}", "guidance.terms.prompt.until_t=0.01")
    made, ask, _ = perp_negs(early, Moment(0, 10))
    assert torch.allclose(made.eps, -ask("null"), rtol=1e-9), "the negatives are inactive while the prompt is inactive"


def test_perp_neg_mixes_neighbouring_views_but_not_the_overhead_view():
    part, prompts = PerpNeg(), ScenePrompts("a <mug>")
    views = Views(Cameras.of([0.0, 45.0, -90.0, 135.0, 180.0, 10.0], torch.tensor([0.0] * 5 + [80.0])), (False,) * 6)
    rows = part.rows("prompt", prompts, views)
    front, side, back = (f"a <mug>, {w} view" for w in ("front", "side", "back"))
    assert rows[0] == ((1.0, front), (0.0, side)) and rows[1] == ((0.5, front), (0.5, side))
    assert rows[2] == ((1.0, side), (0.0, back)) and rows[3] == ((0.5, side), (0.5, back))
    assert rows[4] == ((0.0, side), (1.0, back)) and rows[5] == ((1.0, "a <mug>, overhead view"),)
    weights = part.weights(prompts, views.cameras)
    assert weights[5].tolist() == [0.0, 0.0]
    assert float(weights[4, 1]) == pytest.approx(-(1.0 + 0.967), rel=1e-6), (
        "for a view from behind, the front view has the strongest negative weight"
    )
    assert [r[0][1] for r in part.rows("away_near", prompts, views)[:5]] == [front, front, side, side, side]
    assert [r[0][1] for r in part.rows("away_far", prompts, views)[:5]] == [side, side, front, front, front]


def test_a_real_model_gives_each_view_in_a_batch_the_predictions_that_it_gets_alone(sd):
    scores = BackboneScores(sd, ScenePrompts("a photo of a mug", "bad blurry"), {}, PerpNeg())
    asks, views = [Ask(told) for told in get_args(Told)], looked(30.0, -100.0, 160.0)
    z, t = random(3, *sd.latent_shape(32, 32)).float(), torch.tensor([300, 500, 700])
    together = torch.stack(scores.eps(asks, z, t, views))
    for i, azimuth in enumerate((30.0, -100.0, 160.0)):
        alone = torch.cat(scores.eps(asks, z[i : i + 1], t[i : i + 1], looked(azimuth)))
        assert torch.allclose(together[:, i], alone, atol=1e-5), azimuth
    for told, row in zip(get_args(Told), (together[:, None] - together).abs().amax((2, 3, 4, 5)), strict=True):
        assert int((row < 1e-5).sum()) == 1, f"{told} is predicted as another kind of conditioning is"


# --- mixed views -------------------------------------------------------------------------------


def around(*azimuth_deg: float, elevation_deg: float = 0.0) -> Cameras:
    return Cameras.of(torch.tensor(azimuth_deg), torch.full((len(azimuth_deg),), elevation_deg))


def test_embeddings_are_mixed_near_the_border_between_two_views():
    words = ViewWords(front_deg=45.0, back_deg=45.0, blend_deg=10.0)
    front, near, border, side, back = words.shares(around(-20.0, 40.0, -45.0, 90.0, 170.0))
    assert front == {"front": 1.0} and side == {"side": 1.0} and back == {"back": 1.0}
    assert near == {"front": pytest.approx(0.75), "side": pytest.approx(0.25)}
    assert border == {"front": pytest.approx(0.5), "side": pytest.approx(0.5)}
    (above,) = words.shares(around(0.0, elevation_deg=65.0))
    assert above == {"front": pytest.approx(0.25), "overhead": pytest.approx(0.75)}
    for camera in words.shares(around(*range(-180, 180, 7), elevation_deg=52.0)):
        assert sum(camera.values()) == pytest.approx(1.0)


def test_without_a_blend_each_camera_has_only_one_view_direction():
    words, cameras = ViewWords(), around(*range(-180, 181, 5))
    assert words.shares(cameras) == [{d: 1.0} for d in words.directions(cameras)]


def test_the_teacher_gets_the_mixed_prompts():
    scene = ScenePrompts("a photo of a duck", words=ViewWords(blend_deg=10.0))
    (row,) = scene.rows("prompt", Views(around(50.0), (False,)))
    assert dict((text, share) for share, text in row) == {
        "a photo of a duck, front view": pytest.approx(0.25),
        "a photo of a duck, side view": pytest.approx(0.75),
    }
