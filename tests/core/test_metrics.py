"""Scores match their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shared.metrics import scores
from tests.core.smooth_pictures import drawn


def test_cosine_matches_numpy_and_ignores_scale() -> None:
    a, b = drawn(4, 7), drawn(5, 7, seed=1)
    expected = (
        (a.numpy() @ b.numpy().T) / np.linalg.norm(a.numpy(), axis=1)[:, None] / np.linalg.norm(b.numpy(), axis=1)
    )
    np.testing.assert_allclose(scores.cosine(3 * a, b).numpy(), expected, atol=1e-14)
    assert scores.cosine(torch.zeros(1, 7), b).abs().max() == 0


def test_clip_t_is_computed_per_row_and_clip_i_is_the_mean_over_references() -> None:
    a, b = drawn(4, 7), drawn(4, 7, seed=1)
    full = scores.cosine(a, b)
    torch.testing.assert_close(scores.clip_t(a, b), full.diagonal())
    torch.testing.assert_close(scores.clip_i(a, b), full.mean(1))
    torch.testing.assert_close(scores.dino_i(a, a[:1])[0], torch.tensor(1.0, dtype=torch.float64))
    others = [[j for j in range(4) if j != i] for i in range(4)]
    expected = torch.stack([scores.clip_i(a[i : i + 1], a[o])[0] for i, o in enumerate(others)])
    torch.testing.assert_close(scores.leave_one_out(a), expected)
    assert len(scores.leave_one_out(a[:1])) == 0
    with pytest.raises(ValueError, match="one text per picture"):
        scores.clip_t(a, b[:2])
    with pytest.raises(ValueError, match="no references"):
        scores.clip_i(a, b[:0])


def test_the_text_score_is_clipscore() -> None:
    assert scores.text_score(torch.tensor([-0.2, 0.0, 0.2, 0.3, 0.9])).tolist() == pytest.approx([0, 0, 0.5, 0.75, 1])


def test_retrieval_ranks_synthetic_embeddings_correctly() -> None:
    axes = torch.eye(5, dtype=torch.float64)
    gallery = {"me": torch.stack([axes[0], axes[0] + 0.1 * axes[4]]), **{f"d{i}": axes[i : i + 1] for i in (1, 2, 3)}}
    outputs = torch.stack([axes[0], axes[0] + 0.5 * axes[1], axes[1] + 0.5 * axes[0], axes[3]])
    retrieved = scores.retrieve(outputs, gallery, "me")
    assert retrieved.nearest == ("me", "me", "d1", "d3")
    assert retrieved.hits.tolist() == [True, True, False, False]
    assert retrieved.accuracy == 0.5 and retrieved.chance == 0.25
    assert retrieved.margin[0] > retrieved.margin[1] > 0 > retrieved.margin[3]


def test_a_tie_is_not_a_hit_and_random_outputs_score_at_chance() -> None:
    same = drawn(1, 8)
    assert not scores.retrieve(same, {"me": same, "twin": same}, "me").hits.any()
    gallery = {str(i): drawn(1, 64, seed=i) for i in range(9)}
    hits = scores.retrieve(drawn(4000, 64, seed=99), gallery, "3")
    assert hits.accuracy == pytest.approx(1 / 9, abs=0.03)


def test_retrieval_needs_the_subject_and_a_distractor() -> None:
    with pytest.raises(ValueError, match="at least one other"):
        scores.retrieve(drawn(2, 3), {"me": drawn(1, 3)}, "me")
    with pytest.raises(ValueError, match="must contain 'me'"):
        scores.retrieve(drawn(2, 3), {"a": drawn(1, 3), "b": drawn(1, 3)}, "me")


def test_diversity_is_measured_within_groups() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    rows = torch.stack([axes[0], axes[0], axes[0], axes[1], axes[2], axes[2]])
    diversity = scores.diversity(rows, ["same", "same", "mixed", "mixed", "mixed", "alone"])
    assert diversity == pytest.approx({"same": 0.0, "mixed": 1.0})


def test_drift_is_zero_without_change() -> None:
    a = drawn(5, 16)
    assert scores.drift(a, a.clone()).abs().max() < 1e-12
    assert scores.drift(a, -a).tolist() == pytest.approx([2.0] * 5)


def test_attributes_are_compared_with_the_prompts() -> None:
    seen = {"background": ["beach", "snow"], "view": ["front", "side"]}
    expected = [{"background": "beach", "view": "back"}, {}]
    assert scores.attribute_hits(expected, seen) == [{"background": True, "view": False}, {}]
    with pytest.raises(ValueError, match="unknown attribute 'weather'; the reader supports: background, view"):
        scores.attribute_hits([{"weather": "rain"}, {}], seen)


def test_kid_matches_the_double_sum_in_the_paper() -> None:
    x, y = drawn(5, 4), drawn(6, 4, seed=1)
    k = lambda u, v: (float(u @ v) / 4 + 1) ** 3  # noqa: E731
    xx = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(k(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    xy = sum(k(u, v) for u in x for v in y) / 30
    assert scores.kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kid_is_unbiased_for_one_distribution_and_grows_with_distance() -> None:
    values = [scores.kid(drawn(40, 8, seed=2 * i), drawn(40, 8, seed=2 * i + 1)) for i in range(200)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0
    far = [scores.kid(drawn(40, 8), drawn(40, 8, seed=1) + shift) for shift in (0.5, 1.0, 2.0)]
    assert 0 < far[0] < far[1] < far[2]
    with pytest.raises(ValueError, match="at least 2"):
        scores.kid(drawn(1, 4), drawn(5, 4))


def test_the_trade_off_is_a_harmonic_mean_of_clamped_scores() -> None:
    assert scores.trade_off(0.6, 0.6) == pytest.approx(0.6)
    assert scores.trade_off(1.0, 0.5) == pytest.approx(2 / 3)
    assert scores.trade_off(0.0, 1.0) == scores.trade_off(-0.3, 1.0) == scores.trade_off(0.0, 0.0) == 0.0
    assert scores.trade_off(1.7, 1.0) == 1.0
    assert scores.trade_off(1.0, 0.5, 0.25) == pytest.approx(3 / 7) and scores.trade_off(1.0, 1.0, 0.0) == 0.0


# intervals


def test_bootstrap_matches_the_normal_interval() -> None:
    values = drawn(400).tolist()
    low, high = scores.bootstrap(values)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.02)
    assert high == pytest.approx(np.mean(values) + half, abs=0.02)
    assert (low, high) == scores.bootstrap(values)


def test_bootstrap_resamples_whole_clusters() -> None:
    means = drawn(20)
    values = means.repeat_interleave(50).tolist()
    clusters = [i for i in range(20) for _ in range(50)]
    alone, together = (scores.bootstrap(values, c) for c in (None, clusters))
    assert together[1] - together[0] > 4 * (alone[1] - alone[0])


def test_bootstrap_handles_empty_nan_and_equal_values() -> None:
    assert all(math.isnan(v) for v in scores.bootstrap([]))
    assert all(math.isnan(v) for v in scores.bootstrap([math.nan]))
    assert scores.bootstrap([0.25, 0.25, math.nan]) == (0.25, 0.25)
    low, high = scores.bootstrap([1.0] * 20, [i // 2 for i in range(20)])
    assert high == 1.0 and low == pytest.approx(scores.wilson(10, 10)[0]) and 0.6 < low < 0.8


def test_wilson_intervals_match_published_examples() -> None:
    # Table I of Newcombe (1998) gives these 95% intervals for 81 of 263 and for 1 of 29.
    assert scores.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert scores.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)
