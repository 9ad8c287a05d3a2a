"""The metrics for the amount of motion, consistency and frame appearance match formulas written out in full."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics.clips.appearance import (
    PixelEncoder,
    clip_t_per_frame,
    leakage,
    seed_spread,
    subject_similarity,
    unrelated,
)
from shared.metrics.clips.dynamics import dynamics, frozen
from shared.metrics.clips.flow_fields import FlowFields, flow_fields
from shared.metrics.clips.scorer import ClipScorer, checkpoint_score
from shared.metrics.encoders import CropSettings, Instruments
from tests.core.moving_patches import moving_patch, panned, texture


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fields_of(steps: list[float], share: float, side: int = 100, back: float = -1.0) -> FlowFields:
    """Returns flow fields in which the top `share` of the frame moves right by `steps[i]` cells and the rest is still.

    The backward flow is `back` times the forward flow.
    """
    forward = torch.zeros(len(steps), side, side, 2)
    for i, step in enumerate(steps):
        forward[i, : round(share * side), :, 0] = step
    return FlowFields(forward, back * forward, torch.zeros(len(steps), side, side), (side, side))


def test_the_dynamic_degree_averages_the_longest_five_percent_of_the_flow_vectors() -> None:
    looks = vectors(4, 6)
    assert dynamics(fields_of([2, 4, 6], 1.0), looks).degree == pytest.approx((2 + 4 + 6) / 3 / 100)
    assert dynamics(fields_of([2, 4, 6], 0.05), looks).degree == pytest.approx((2 + 4 + 6) / 3 / 100)
    assert dynamics(fields_of([2, 4, 6], 0.02), looks).degree == pytest.approx(0.4 * (2 + 4 + 6) / 3 / 100)
    assert dynamics(fields_of([2, 4, 6], 1.0, back=0.3), looks).degree == 0, (
        "flow that the backward flow contradicts was counted"
    )


@pytest.mark.parametrize(
    ("frames", "fast", "expected"), [(16, 3, False), (16, 4, True), (8, 1, False), (8, 2, True), (2, 1, True)]
)
def test_a_clip_is_dynamic_if_a_quarter_of_its_frames_exceed_the_threshold(
    frames: int, fast: int, expected: bool
) -> None:
    threshold = 100 * 6 / 256
    steps = [threshold * 1.01] * fast + [threshold * 0.99] * (frames - 1 - fast)
    assert dynamics(fields_of(steps, 1.0), vectors(frames, 6)).dynamic is expected


def test_consistency_averages_the_cosines_of_neighbouring_frames_or_of_all_pairs() -> None:
    looks = vectors(5, 7)
    moved = dynamics(fields_of([1] * 4, 1.0), looks)

    def cos(i: int, j: int) -> float:
        a, b = looks[i].double(), looks[j].double()
        return float(a @ b / a.norm() / b.norm())

    assert moved.consistency == pytest.approx(sum(cos(i, i + 1) for i in range(4)) / 4, abs=1e-12)
    pairs = [cos(i, j) for i in range(5) for j in range(i)]
    assert moved.consistency_all_pairs == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    for frames, count, message in ((5, 4, "4 embeddings for a clip of 5 frames"), (1, 1, "a clip of one frame")):
        with pytest.raises(ValueError, match=message):
            dynamics(fields_of([1.0] * (frames - 1), 1.0), vectors(count, 7))


def test_the_dynamic_degree_of_a_panned_clip_is_its_displacement() -> None:
    for step in (1, 3):
        clip = panned(step)
        moved = dynamics(flow_fields(clip), PixelEncoder().images(clip.transpose(0, 1)))
        assert moved.degree == pytest.approx(step / 64, rel=0.15)
        assert moved.dynamic is (step == 3)


def test_a_still_picture_is_frozen_even_if_it_flickers() -> None:
    still = texture((64, 64), 0)[:, None].repeat(1, 5, 1, 1)
    flicker = still + 0.03 * vectors(3, 5, 64, 64)
    glimmer = still + 0.02 * F.interpolate(vectors(3, 5, 8, 8), (64, 64), mode="bilinear")
    assert frozen(still) and frozen(flicker) and frozen(glimmer) and frozen(still[:, :1])
    assert frozen(torch.zeros(3, 4, 32, 32))
    assert not frozen(moving_patch((1, 0))) and not frozen(panned(1))
    assert not frozen(moving_patch((14, 0), frames=4, side=12)), (
        "a clip whose patch moves too fast to be tracked was counted as frozen"
    )
    moved = dynamics(flow_fields(still), PixelEncoder().images(still.transpose(0, 1)))
    assert moved.degree == 0 and moved.consistency == pytest.approx(1) and not moved.dynamic


def test_clip_t_is_computed_for_each_frame() -> None:
    frames, text = vectors(4, 6), vectors(6, seed=1)
    expected = [float(f @ text / f.norm() / text.norm()) for f in frames]
    torch.testing.assert_close(clip_t_per_frame(frames, text), torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_leakage_averages_the_best_match_of_each_frame() -> None:
    frames, clips = vectors(3, 5), [vectors(4, 5, seed=1), vectors(2, 5, seed=2)]

    def cos(a: Tensor, b: Tensor) -> float:
        return float(a.double() @ b.double() / a.double().norm() / b.double().norm())

    expected = sum(max(cos(f, g) for clip in clips for g in clip) for f in frames) / 3
    assert leakage(frames, clips) == pytest.approx(expected, abs=1e-12)
    assert leakage(clips[1], clips) == pytest.approx(1)
    between = unrelated([frames, *clips])
    assert between[0] == pytest.approx(expected, abs=1e-12) and len(between) == 3
    assert max(between) < 1, "a clip was compared with itself"
    assert unrelated(clips[:1]) == []
    with pytest.raises(ValueError, match="but there are none"):
        leakage(frames, [])


def test_the_seed_spread_compares_clips_of_the_same_prompt_frame_by_frame() -> None:
    looks = F.normalize(vectors(5, 3, 4).double(), dim=2)
    spread = seed_spread(looks, ["a", "b", "a", "a", "c"])
    pairs = [(0, 2), (0, 3), (2, 3)]
    expected = 1 - sum(float((looks[i] * looks[j]).sum(1).mean()) for i, j in pairs) / 3
    assert spread.keys() == {"a"} and spread["a"] == pytest.approx(expected, abs=1e-12)
    assert seed_spread(looks[:1].repeat(2, 1, 1), [0, 0])[0] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="5 clips and 2 groups"):
        seed_spread(looks, [0, 1])


def test_the_pixel_encoder_can_stand_in_for_a_network() -> None:
    one, two = texture((48, 64), 0), texture((48, 64), 9)
    looks = PixelEncoder().images(torch.stack([one, one.mul(0.5).add(0.2), two, torch.zeros_like(one)]))
    assert torch.allclose(looks.norm(dim=1), torch.ones(4))
    between = looks @ looks.T
    assert between[0, 1] > 0.999, "brightness and contrast should make no difference"
    assert between[0, 2].abs() < 0.3 and between[0, 3] < 0.01 and between[3, 3] == pytest.approx(1)


def test_masked_similarity_ignores_the_background() -> None:
    """The same patch is similar on a different background, but a different patch on that background is not."""
    same, other = moving_patch((3, 0), seed=0), moving_patch((3, 0), seed=7)
    elsewhere = same.clone()
    where = torch.zeros(5, 64, 64)
    for i in range(5):
        left = 22 + 3 * (i - 2)
        where[i, 22:42, left : left + 20] = 1
        elsewhere[:, i] = torch.where(where[i] > 0, same[:, i], other[:, i])
    frames, references = elsewhere.transpose(0, 1), same.transpose(0, 1)[:2]
    how = CropSettings(margin=0.8)
    near = subject_similarity(PixelEncoder(), (frames, where), (references, where[:2]), how)
    far = subject_similarity(PixelEncoder(), (other.transpose(0, 1), where), (references, where[:2]), how)
    assert near.shape == (5,) and near.min() > 0.9 and far.max() < 0.4


def test_the_checkpoint_score_is_the_product_of_its_terms() -> None:
    means = {"identity": 0.8, "motion_fidelity": 0.5, "leakage": 0.25}
    assert checkpoint_score(means) == pytest.approx(0.8 * 0.5 * 0.75)
    assert checkpoint_score({**means, "motion_recognised": 0.9}) == pytest.approx(0.8 * 0.9 * 0.75)
    assert checkpoint_score({"motion_fidelity": -0.4}) == 0 and checkpoint_score({}) == 1


def test_during_training_frozen_clips_are_counted_and_copies_score_zero() -> None:
    right, left = moving_patch((4, 0), seed=0), moving_patch((-4, 0), seed=3)
    again = moving_patch((3, 0), seed=6)
    still = right[:, :1].repeat(1, 5, 1, 1)
    scorer = ClipScorer(motion_clips=[right])
    scores = {name: scorer(clip[None], ["a mug"]) for name, clip in locals().items() if isinstance(clip, Tensor)}
    assert {name: s["frozen"] for name, s in scores.items()} == {"right": 0, "left": 0, "again": 0, "still": 1}
    assert scores["right"]["motion_fidelity"] == 1 and scores["right"]["score"] == pytest.approx(0, abs=1e-5)
    assert scores["again"]["score"] > 0.5 > scores["left"]["score"] and scores["still"]["score"] == 0
    assert scorer(torch.stack([right, still]), ["a mug"] * 2)["frozen"] == 0.5
    measured = scorer.measure(torch.stack([right, left]), ["a mug"] * 2)
    assert measured.embeddings.shape[:2] == (2, 5) and not any(math.isnan(v) for v in measured.scores["leakage"])
    with pytest.raises(ValueError, match="1 clips, 2 prompts"):
        scorer.measure(right[None], ["a", "b"])


def test_frames_that_show_what_the_prompt_describes_are_counted() -> None:
    class Reader:
        info = PixelEncoder.info

        def read(self, pixels: Tensor) -> dict[str, list[str]]:
            return {"side": ["left" if p[:, :, :16].mean() > p[:, :, 16:].mean() else "right" for p in pixels]}

    clip = -torch.ones(3, 4, 32, 32)
    for i, left in enumerate((2, 4, 6, 24)):
        clip[:, i, 8:16, left : left + 6] = 1
    scorer = ClipScorer(Instruments(attributes=Reader()))
    measured = scorer.measure(clip[None], ["a"], [{"side": "left"}])
    assert measured.scores["side"] == [0.75] and measured.seen == [{"side": "left"}]
    with pytest.raises(ValueError, match="unknown attribute 'place'"):
        scorer.measure(clip[None], ["a"], [{"place": "x"}])
