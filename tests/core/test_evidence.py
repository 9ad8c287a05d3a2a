"""The shipped instruments recognize true pictures, and overestimate neither identity nor freedom (how much poses vary).

They are tested on pictures whose ground truth is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shared.evaluation.clips.case_facts import ClipCase
from shared.evaluation.clips.evaluate import ClipShots, Makers, evaluate_clips
from shared.evaluation.clips.prompt_sets import ClipTexts, load_clip_prompts
from shared.evaluation.poses import poses
from shared.evaluation.prompt_sets import load_prompts
from shared.metrics import measure_true as measuring
from shared.metrics.clips.scorer import ClipScorer
from shared.metrics.freedom import pooled
from shared.metrics.instruments import load_instruments
from shared.metrics.scorer import Scorer
from shared.metrics.toybox import ToyboxThing
from shared.metrics.true_thing import Asked
from shared.pretrain.evaluators.calibrate import shifted
from shared.pretrain.evaluators.reconstructions import load_vae, round_trip
from shared.toybox import reference_sets as album
from shared.toybox.motions.clips import draw_clip
from shared.toybox.motions.reference_clips import reference_moving
from shared.toybox.render import render
from shared.toybox.subjects import reference_scenes
from shared.toybox.true_renders import asked_scenes
from shared.toybox.weights import WEIGHTS
from shared.toybox.world import Camera, Scene

PROMPTS = [p for p in load_prompts("toybox").prompts[:10] if p.free]
SHEET = Path(__file__).parents[1] / "data" / "pivotal-robot.png"
POSE = Camera(45, 33, 0, 0, 0.03, 0.9)  # far from the references' poses
ROBOT = album.held_out("development-robot")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def through() -> Callable[[Tensor], Tensor]:
    vae = load_vae(WEIGHTS / "backbone" / "vae")
    return lambda pixels: round_trip(vae, (pixels + 1) / 2) * 2 - 1


@pytest.fixture(scope="module")
def judge(through: Callable[[Tensor], Tensor]) -> Scorer:
    scenes = reference_scenes(ROBOT.thing, 5, 0)
    drawn = render(scenes)
    scorer = Scorer(
        drawn.pixels * 2 - 1,
        load_instruments(evaluators="toybox"),
        "robot",
        "my-robot",
        album.gallery(ROBOT),
        album.fresh(ROBOT),
        through=through,
        masks=drawn.mask[:, 0],
    )
    asked = [Asked(p.expects, p.free) for p in PROMPTS]
    thing = ToyboxThing(ROBOT.thing, "development")
    scorer.figures = measuring.measure_true(scorer.verifier, thing, asked, scorer.instruments)
    return scorer


def _scenes(each: int, seed: int, camera: Callable[[int], Camera] | None = None) -> list[Scene]:
    """Returns `each` ground-truth scenes per prompt, grouped by prompt."""
    asked = [p.expects for p in PROMPTS for _ in range(each)]
    scenes = asked_scenes(ROBOT.thing, asked, seed)
    return scenes if camera is None else [replace(s, cameras=(camera(i),)) for i, s in enumerate(scenes)]


def _drawn(scenes: Sequence[Scene]) -> Tensor:
    return render(scenes).pixels * 2 - 1


def _measured(judge: Scorer, pixels: Tensor, each: int) -> tuple[float, float | None, float]:
    """Returns the share of verified pictures, the freedom (None if it cannot be measured), and the share of copies."""
    of = [i for i in range(len(PROMPTS)) for _ in range(each)]
    expects: list[Mapping[str, str]] = [PROMPTS[i].expects for i in of]
    measured = judge.measure(pixels, [PROMPTS[i].plain("robot") for i in of], expects)
    turned = poses([(measured, of)], set(of))
    assert turned is not None and judge.figures is not None and judge.figures.range is not None
    freedom = judge.figures.range.freedom(pooled(turned.by_prompt.values()))
    return measured.mean("verified"), freedom, measured.mean("copied")


def test_true_pictures_are_verified_and_have_high_freedom(judge: Scorer, through: Callable[[Tensor], Tensor]) -> None:
    assert judge.figures is not None
    bar = judge.figures.bars[""]
    assert 0.5 <= bar.passed <= 1 and bar.pictures >= measuring.BEHIND
    verified, freedom, _ = _measured(judge, through(_drawn(_scenes(16, 5))), 16)
    assert abs(verified - bar.passed) < 0.2
    assert freedom is not None and freedom >= 0.9


def test_pictures_in_one_pose_have_little_freedom_wherever_the_subject_is_placed(
    judge: Scorer, through: Callable[[Tensor], Tensor]
) -> None:
    rng, found = np.random.default_rng(3), []
    for pose in (
        POSE,
        replace(POSE, azimuth_deg=95, elevation_deg=15),
        replace(POSE, azimuth_deg=25, elevation_deg=15),
    ):

        def moved(_: int, pose: Camera = pose) -> Camera:
            return replace(pose, x=float(rng.uniform(-0.15, 0.15)), y=float(rng.uniform(-0.1, 0.12)))

        _, freedom, _ = _measured(judge, through(_drawn(_scenes(4, 6, moved))), 4)
        assert freedom is not None
        found.append(freedom)
    assert sum(found) / len(found) <= 0.1 and max(found) <= 0.2, found


def test_shifted_copies_of_one_picture_have_little_freedom(judge: Scorer, through: Callable[[Tensor], Tensor]) -> None:
    one = through(_drawn(_scenes(1, 7, lambda _: POSE)))
    _, freedom, _ = _measured(judge, shifted(one, np.random.default_rng(4)), 4)
    assert freedom is not None and freedom <= 0.1


def test_pictures_in_the_one_pose_that_pivotal_tuning_learned_have_little_freedom(judge: Scorer) -> None:
    sheet = torch.from_numpy(np.array(Image.open(SHEET).convert("RGB"))).permute(2, 0, 1) / 127.5 - 1
    tiles = sheet.unfold(1, 64, 64).unfold(2, 64, 64).permute(1, 2, 0, 3, 4).reshape(-1, 3, 64, 64)
    _, freedom, _ = _measured(judge, tiles, 4)
    assert freedom is not None and freedom <= 0.2


def test_freedom_is_not_measured_for_noise_or_when_half_the_pictures_show_another_subject(
    judge: Scorer, through: Callable[[Tensor], Tensor]
) -> None:
    noise = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    verified, freedom, _ = _measured(judge, noise, 4)
    assert verified == 0 and freedom is None
    mixed = _scenes(4, 8)
    stranger = ROBOT.distractors[0]
    mixed = [s if i % 2 else replace(s, things=(stranger,)) for i, s in enumerate(mixed)]
    _, freedom, _ = _measured(judge, through(_drawn(mixed)), 4)
    assert freedom is None


def test_cutouts_of_the_references_are_recognized_as_copies(judge: Scorer, through: Callable[[Tensor], Tensor]) -> None:
    rng = np.random.default_rng(5)
    empty = _drawn(_scenes(4, 9, lambda _: Camera(0, 15, 0, 0.45, 0.45, 0.05)))
    assert judge.masks is not None
    pasted = []
    for i, background in enumerate(empty):
        shift = tuple(int(v) for v in rng.integers(-6, 7, 2))
        thing, mask = (torch.roll(t, shift, (-2, -1)) for t in (judge.references[i % 5], judge.masks[i % 5]))
        pasted.append(mask * thing + (1 - mask) * background)
    for pictures in (torch.stack(pasted), through(torch.stack(pasted))):
        verified, freedom, copied = _measured(judge, pictures, 4)
        assert copied >= 0.75 and verified <= 0.25 and freedom is None


def test_masked_likeness_and_freedom_are_measured_in_clips(judge: Scorer, through: Callable[[Tensor], Tensor]) -> None:
    """For the first prompt, the poses in the two clips differ. For the second, both clips are the same."""

    def maker(name: str, *order: int) -> Callable[..., Tensor]:
        scenes = reference_moving("development-zigzag", max(order) + 1, 0, 2, album.held_out(name).thing)
        drawn = [draw_clip(scene).frames.permute(0, 3, 1, 2) * 2 - 1 for scene in scenes]  # [2, 3, 64, 64]
        clips = [through(frames).transpose(0, 1) for frames in drawn]
        return lambda prompts, seeds, progress: torch.stack([clips[i] for i in order])

    case = ClipCase(subject="my-robot", class_noun="robot")
    texts = ClipTexts(load_clip_prompts("toybox_motion"), "", "my-robot", "robot", limit=2)
    makers = Makers(maker("development-robot", 0, 1, 0, 0), maker("development-duck", 0, 0, 0, 0))
    report = evaluate_clips(makers, case, texts, ClipScorer(judge.instruments, thing=judge), ClipShots((0, 1)))
    freedom = [row.scores["freedom"] for row in report.of_kind("concept")]
    assert freedom[0] == freedom[1] and freedom[0] is not None and freedom[0] > 0.5
    assert freedom[2:] == [0, 0]
    assert report.value("freedom") == pytest.approx(freedom[0] / 2)
    likeness = report.score("subject_crops")
    assert likeness and likeness.value is not None and likeness.base is not None
    assert likeness.value > 0.8 > 0.3 > likeness.base
    assert not any("whole frames" in note for note in report.notes)
