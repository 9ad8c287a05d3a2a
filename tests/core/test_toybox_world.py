"""Tests the toybox world's vocabularies, scenes and captions, and what is held out from training."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from shared.pretrain.evaluators.data import sample_group
from shared.pretrain.toybox import dataset
from shared.toybox import captions, patterns, subjects, world
from shared.toybox.world import Camera, Scene, Thing

SPLITS = ("development", "reporting")


def scenes(n: int, seed: int = 0, **fixed: Any) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, **fixed) for _ in range(n)]


def test_the_same_seed_gives_the_same_scenes():
    assert scenes(50) == scenes(50)
    assert scenes(50) != scenes(50, seed=1)


def test_the_distribution_of_scenes_follows_the_design():
    drawn = scenes(3000)
    share = {
        "pattern": np.mean([s.things[0].pattern_seed is not None for s in drawn]),
        "accessory": np.mean([s.things[0].accessory != "none" for s in drawn]),
        "style": np.mean([s.style != "photo" for s in drawn]),
        "two": np.mean([len(s.things) == 2 for s in drawn]),
    }
    for name, expected in {"pattern": 0.45, "accessory": 0.15, "style": 0.15, "two": 0.08}.items():
        assert share[name] == pytest.approx(expected, abs=0.03), name
    cameras = [s.cameras[0] for s in drawn if len(s.things) == 1]
    assert len(cameras) > 2500
    for values, got in (
        (world.CLASSES, [s.things[0].class_name for s in drawn]),
        (world.BACKGROUNDS, [s.background for s in drawn]),
        (world.VIEWS, [s.view for s in drawn]),
        (world.ACCESSORIES, [s.things[0].accessory for s in drawn]),
        (world.STYLES, [s.style for s in drawn]),
        (world.COLORS, [s.things[0].main for s in drawn]),
    ):
        assert set(got) == set(values)


def test_positions_sizes_and_angles_cover_their_designed_ranges():
    """Positions cover ±35% of both axes, scales 0.4 to 1.1, rolls ±25 degrees, and azimuths the full circle."""
    cameras = [s.cameras[0] for s in scenes(20_000, seed=8) if len(s.things) == 1]
    x, y, scale, roll, azimuth = np.array([(c.x, c.y, c.scale, c.roll_deg, c.azimuth_deg) for c in cameras]).T
    for values, limit in ((x, 0.35), (y, 0.35), (roll, 25.0)):
        assert -limit <= values.min() < -0.97 * limit and 0.97 * limit < values.max() <= limit
    assert 0.4 <= scale.min() < 0.41 and 1.09 < scale.max() <= 1.1
    assert np.histogram(azimuth, 24, (-180, 180))[0].min() > 0.015 * len(cameras)
    off = np.maximum(abs(x), abs(y)) > 0.15
    assert 0.1 < off.mean() < 0.2, "off-centre positions are common, not just possible"
    assert np.mean(abs(roll) > 10) > 0.1
    # Only small things reach the border, so most of each thing stays in the picture.
    assert scale[np.maximum(abs(x), abs(y)) > 0.3].max() < 0.7 and abs(x[scale > 0.8]).max() > 0.2


@pytest.mark.parametrize(
    ("azimuth", "elevation", "view"),
    [
        (0, 10, "front"),
        (-38, 0, "front"),
        (90, 10, "side"),
        (-90, 10, "side"),
        (180, 10, "back"),
        (-150, 20, "back"),
        (540, 20, "back"),
        (359, 0, "front"),
        (0, 60, "above"),
        (170, 75, "above"),
    ],
)
def test_the_view_follows_from_the_camera_angles(azimuth, elevation, view):
    assert Camera(azimuth, elevation).view == view


def test_a_fixed_view_is_clear_and_correct():
    for view in world.VIEWS:
        assert all(s.view == view and s.cameras[0].view_is_clear for s in scenes(60, view=view))


def test_fixed_attributes_are_kept():
    fixed: dict[str, Any] = {
        "class_name": "cat",
        "main": "red",
        "second": "white",
        "background": "snow",
        "style": "cartoon",
        "accessory": "red hat",
        "view": "side",
    }
    for s in scenes(20, pattern=True, **fixed):
        t = s.things[0]
        assert (t.class_name, t.main, t.second, s.background, s.style, t.accessory, s.view) == tuple(fixed.values())
        assert t.pattern_seed in world.SEEDS["train"]
    with pytest.raises(ValueError, match="cannot fix colour"):
        world.sample_scene(np.random.default_rng(0), colour="red")


def test_impossible_things_are_refused():
    with pytest.raises(ValueError, match="no 'elephant'"):
        Thing("elephant", "red", "blue")
    with pytest.raises(ValueError, match="must differ"):
        Thing("cat", "red", "red")
    with pytest.raises(ValueError, match="identity"):
        Thing("face", "red", "blue")


def test_scenes_with_glasses_are_not_viewed_from_behind():
    for s in scenes(200, accessory="pink glasses"):
        camera = s.cameras[0]
        assert abs(camera.azimuth_deg) <= 105 or camera.elevation_deg >= 60


def test_captions_use_the_vocabulary_and_are_short():
    known, rng, met = set(captions.vocabulary()), np.random.default_rng(1), set()
    for s in scenes(3000, seed=1):
        for full in (False, True):
            text = captions.caption(s, rng, full)
            words = re.findall(r"\S+?(?=,|\s|$)|,", text)
            assert set(words) <= known, text
            assert len(words) <= captions.MAX_WORDS, text
            met |= set(words)
    assert known == met


def test_the_full_caption_names_everything_except_the_pattern():
    s = Scene((Thing("duck", "red", "blue", 3),), "beach", (Camera(90, 10),))
    text = captions.caption(s, np.random.default_rng(0), full=True)
    assert text == "a photo of a red duck with blue wings on the beach, side view"
    hatted = replace(s, things=(replace(s.things[0], accessory="red hat"),), style="pencil sketch")
    text = captions.caption(hatted, np.random.default_rng(0), full=True)
    assert text == "a pencil sketch of a red duck with blue wings wearing a red hat on the beach, side view"


def test_captions_always_name_the_accessory_and_the_style_and_never_the_pattern():
    rng = np.random.default_rng(2)
    for s in scenes(500, seed=2):
        text = captions.caption(s, rng)
        if s.things[0].accessory != "none":
            assert captions.WORN[s.things[0].accessory] in text
        if s.style != "photo":
            assert any(opening in text for opening in captions.OPENINGS[s.style])
        plain = replace(s, things=tuple(replace(t, pattern_seed=None) for t in s.things))
        assert captions.caption(s, np.random.default_rng(5)) == captions.caption(plain, np.random.default_rng(5))


def test_about_70_percent_of_captions_name_the_view():
    rng = np.random.default_rng(3)
    named = [("view" in text or "seen" in text) for text in (captions.caption(s, rng) for s in scenes(2000, seed=3))]
    assert np.mean(named) == pytest.approx(0.7, abs=0.04)


def test_captions_match_their_scenes():
    named, heard = 0, 0
    for i in range(600):
        scene, rng = dataset.scene_of(5, i)
        labels = dict(zip(dataset.LABELS, dataset.labels_of(scene), strict=True))
        kind, view, worn = captions.caption_attributes(captions.caption(scene, rng))
        if labels["two_objects"]:
            assert (kind, worn) == (-1, -1)
        else:
            assert (kind, worn) == (labels["class"], labels["accessory"])
        named, heard = named + 1, heard + (view >= 0)
        assert view in (-1, labels["view"])
    assert 0.6 < heard / named < 0.85
    assert captions.caption_attributes("a red house on top of green grass")[1] == -1, (
        "the word 'top' alone does not name a view"
    )


@pytest.mark.parametrize("split", SPLITS)
def test_subjects_have_distractors_with_the_same_class_and_palette(split):
    held_out = subjects.subjects(split)
    assert sorted(h.thing.class_name for h in held_out) == sorted(c for c in world.CLASSES if c != "face")
    for h in held_out:
        assert len(h.distractors) >= 8
        looks = {(t.class_name, t.main, t.second) for t in (h.thing, *h.distractors)}
        assert len(looks) == 1
        seeds = [t.pattern_seed for t in (h.thing, *h.distractors)]
        assert len(set(seeds)) == len(seeds)
        assert all(s in world.SEEDS[split] for s in seeds)
    assert len(subjects.faces(split)) >= 4
    assert all(len(h.distractors) >= 8 for h in subjects.faces(split))


def test_held_out_seeds_and_styles_are_disjoint_from_those_used_in_training():
    ranges = list(world.SEEDS.values())
    for i, a in enumerate(ranges):
        for b in ranges[i + 1 :]:
            assert a.stop <= b.start or b.stop <= a.start
    for a, b in (
        (world.STYLES, subjects.styles("development")),
        (world.STYLES, subjects.styles("reporting")),
        (subjects.styles("development"), subjects.styles("reporting")),
    ):
        assert not set(a) & set(b)
    assert all(s.style in world.STYLES for s in scenes(300))
    assert all(t.pattern_seed is None or t.pattern_seed in world.SEEDS["train"] for s in scenes(300) for t in s.things)
    words = set(captions.vocabulary())
    assert not words & {"blueprint", "halftone", "stained", "thermal", "duotone", "mosaic", "woodcut", "crosshatch"}


def test_no_held_out_pattern_is_a_near_duplicate_of_a_training_pattern():
    """Compares every held-out pattern with every training pattern by their parameters, not just their seeds."""
    held = {t.pattern_seed for split in SPLITS for h in subjects.subjects(split) for t in (h.thing, *h.distractors)}
    inner = np.stack([patterns.fingerprint(s) for s in held if s is not None])
    train = np.stack([patterns.fingerprint(s) for s in world.SEEDS["train"]])
    nearest = np.array([np.sqrt(((train - row) ** 2).sum(1)).min() for row in inner])
    # Two patterns of the same kind are about 4 apart. A distance of 0.3 is hard to see.
    assert nearest.min() > 0.5


def test_no_held_out_face_is_a_near_duplicate_of_a_training_face():
    held = np.array([t.identity for split in SPLITS for h in subjects.faces(split) for t in (h.thing, *h.distractors)])
    train = np.array([world.identity_of(s) for s in world.SEEDS["train"]])
    nearest = [np.sqrt(((train - row) ** 2).sum(1)).min() for row in held]
    assert min(nearest) > 0.5


def test_training_scenes_never_show_a_held_out_face_pattern_or_style():
    """Checks scenes drawn from the world, from the data set and from the groups that train the identity encoder."""
    things = [(t, s.style) for s in (*scenes(1500, seed=9), *scenes(400, seed=9, class_name="face")) for t in s.things]
    things += [(t, s.style) for s in (dataset.scene_of(0, i)[0] for i in range(1500)) for t in s.things]
    groups = (sample_group(np.random.default_rng(i), 4, 2) for i in range(60))
    things += [(t, s.style) for group in groups for views in group for s in views for t in s.things]
    identities = {t.identity for t, _ in things if t.identity is not None}
    assert len(identities) > 300 and identities <= {world.identity_of(s) for s in world.SEEDS["train"]}
    held = [t for split in SPLITS for h in subjects.faces(split) for t in (h.thing, *h.distractors)]
    drawn, kept = np.array(list(identities)), np.array([t.identity for t in held])
    assert np.sqrt(((drawn[:, None] - kept[None]) ** 2).sum(2)).min() > 0.5
    patterns_held = {
        t.pattern_seed for split in SPLITS for h in subjects.subjects(split) for t in (h.thing, *h.distractors)
    }
    assert not patterns_held & {t.pattern_seed for t, _ in things}
    assert {style for _, style in things} == set(world.STYLES)
    assert not {style for _, style in things} & set(subjects.style_names().values())


def test_reference_scenes_are_varied_plain_photos():
    thing = subjects.subjects("development")[0].thing
    poses = subjects.reference_scenes(replace(thing, accessory="red hat"), 6, 4)
    assert poses == subjects.reference_scenes(thing, 6, 4)
    assert {s.style for s in poses} == {"photo"} and {s.things[0].accessory for s in poses} == {"none"}
    assert len({s.background for s in poses}) == 6 and {s.view for s in poses} == set(world.VIEWS)
    with pytest.raises(ValueError, match="no held-out split 'train'"):
        subjects.subjects("train")
