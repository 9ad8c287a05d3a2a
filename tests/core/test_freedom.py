"""Freedom, which measures how much poses vary, and its components match closed forms and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics import freedom
from shared.metrics.copied_things import thing_similarity
from shared.metrics.crops import aligned_crops, placements
from shared.metrics.freedom import Pairs, Range
from shared.metrics.scores import trade_off
from shared.metrics.trade_off import Tally, bootstrap_terms, measured_terms


def _box(size: int, top: int, left: int, height: int, width: int) -> Tensor:
    where = torch.zeros(1, size, size)
    where[:, top : top + height, left : left + width] = 1
    return where


def test_placement_finds_the_centre_and_size_of_a_box() -> None:
    x, y, half = placements(_box(32, 4, 10, 8, 12))[0].tolist()
    assert (x, y) == pytest.approx((16 / 16 - 1, 8 / 16 - 1))
    assert half == pytest.approx(12 / 32, rel=0.01)  # half the larger side, as a fraction of half the picture
    assert placements(torch.zeros(1, 8, 8))[0].tolist() == [0, 0, 1], "if nothing is found, the whole picture is used"
    assert torch.equal(placements(_box(8, 2, 2, 4, 4)), placements(_box(8, 2, 2, 4, 4) * 0.5)), (
        "halving the values does not change the placement"
    )


def test_crops_show_the_thing_at_a_fixed_position_and_size() -> None:
    coarse = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    thing = F.interpolate(coarse, (32, 32), mode="bilinear")
    pictures, maps = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64)
    pictures[0, :, 8:40, 20:52], maps[0, 8:40, 20:52] = thing[0], 1
    pictures[1, :, 40:56, 4:20], maps[1, 40:56, 4:20] = F.interpolate(thing, (16, 16), mode="area")[0], 1
    large, small = aligned_crops(pictures, maps, 1.0)
    assert (large - F.interpolate(thing, (64, 64), mode="bilinear")[0]).abs().mean() < 0.03
    assert (large - small).abs().mean() < 0.1
    again = aligned_crops(torch.roll(pictures[:1], (5, 7), (2, 3)), torch.roll(maps[:1], (5, 7), (1, 2)), 1.0)
    assert (again[0] - large).abs().max() < 1e-3
    blurred = aligned_crops(pictures, maps, 1.0, 8)
    assert (blurred[0] - blurred[1]).abs().mean() < (large - small).abs().mean()
    wide = aligned_crops(pictures[:1], maps[:1], 2.0)
    assert wide[0, :, 16:48, 16:48].abs().sum() > 0.9 * wide.abs().sum(), (
        "with twice the margin, the thing is half as large"
    )


def test_only_pairs_of_verified_pictures_are_counted() -> None:
    e = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    groups, verified = list("aaaabbc"), torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
    found = freedom.pairs(e, groups, verified)
    unit = F.normalize(e.double(), dim=1)
    total = sum(1 - float(unit[i] @ unit[j]) for i, j in ((0, 1), (0, 3), (1, 3)))
    assert (found["a"].of, found["a"].counted) == (6, 3) and found["a"].distance == pytest.approx(total)
    assert (found["b"].of, found["b"].counted, found["b"].distance) == (1, 0, 0)
    assert (found["c"].of, found["c"].counted) == (0, 0) and math.isnan(found["c"].mean)
    assert freedom.pooled(found.values()) == Pairs(7, 3, found["a"].distance)
    with pytest.raises(ValueError, match="7 embeddings, 2 groups"):
        freedom.pairs(e, ["a", "b"], verified)


def test_freedom_is_scaled_between_one_pose_and_random_views() -> None:
    known = Range(free=0.3, fixed=0.1)
    assert known.freedom(Pairs(10, 10, 2.0)) == pytest.approx(0.5)
    assert known.freedom(Pairs(10, 10, 0.5)) == 0 and known.freedom(Pairs(10, 10, 9.0)) == 1
    assert known.freedom(Pairs(10, 3, 0.6)) is not None and known.freedom(Pairs(10, 2, 0.4)) is None
    assert Range(0.1, 0.1).freedom(Pairs(10, 10, 2.0)) is None and known.freedom(Pairs(0, 0, 0)) is None


def test_the_number_of_effective_views_is_the_exponential_of_the_entropy() -> None:
    assert freedom.effective_views(["front"] * 5) == pytest.approx(1)
    assert freedom.effective_views(["front", "side", "back", "above"]) == pytest.approx(4)
    p = np.array([0.75, 0.25])
    assert freedom.effective_views(["a", "a", "a", "b"]) == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert math.isnan(freedom.effective_views([]))


def test_the_spread_of_placement_is_measured_within_prompts() -> None:
    at = torch.tensor([[0.1, 0.2, 0.5], [0.3, 0.2, 0.7], [0.9, 0.9, 0.3], [0.9, 0.9, 0.3]])
    place, size = freedom.placement_spread(at, ["a", "a", "b", "b"])
    assert place == pytest.approx(math.sqrt(0.02 / 2)) and size == pytest.approx(math.sqrt(0.02 / 2))
    assert all(math.isnan(v) for v in freedom.placement_spread(at[:2], ["a", "b"]))


# the subject cut out of a reference


def _scene(thing: Tensor, mask: Tensor, background: float, dy: int, dx: int) -> tuple[Tensor, Tensor]:
    picture = torch.full((1, 3, 64, 64), background)
    picture[:, :, 10:42, 14:46] = torch.where(mask > 0, thing, picture[:, :, 10:42, 14:46])
    where = torch.zeros(1, 64, 64)
    where[:, 10:42, 14:46] = mask
    return torch.roll(picture, (dy, dx), (2, 3)), torch.roll(where, (dy, dx), (1, 2))


def test_a_pasted_thing_is_found_and_another_thing_is_not() -> None:
    draws = torch.Generator().manual_seed(3)
    one, two = (F.interpolate(torch.rand(1, 3, 7, 7, generator=draws) * 2 - 1, (32, 32), mode="bilinear") for _ in "ab")
    row = torch.arange(32) - 15.5
    mask = ((row[:, None] ** 2 + row[None] ** 2) < 15**2).float()
    reference, where = _scene(one, mask, -0.8, 0, 0)
    pasted, pasted_where = _scene(one * 0.7 + 0.1, mask, 0.6, 9, -6)
    mirrored, mirrored_where = pasted.flip(3), pasted_where.flip(2)
    other, other_where = _scene(two, mask, 0.6, 9, -6)
    pictures, maps = torch.cat([pasted, mirrored, other]), torch.cat([pasted_where, mirrored_where, other_where])
    similarity = thing_similarity(pictures, maps, reference, where)[:, 0]
    assert similarity[:2].min() > 0.95 and similarity[2] < 0.7
    flat = torch.full((1, 3, 64, 64), 0.2)
    assert thing_similarity(flat, where, reference, where).abs().max() < 0.1


# the trade-off


def _tally(subject: str, prompt: int, identity: float, text: float, pairs: Pairs | None = None) -> Tally:
    return Tally(subject, prompt, identity * 4, 4, 0.8 * 4, text * 4, 4, pairs)


def test_the_trade_off_is_the_harmonic_mean_of_its_terms() -> None:
    tallies = [_tally("a", 0, 0.5, 1.0, Pairs(6, 6, 1.2)), _tally("a", 1, 0.3, 0.5)]
    terms = measured_terms(tallies, {"a": Range(0.3, 0.1)})
    assert terms.identity == pytest.approx(0.4 / 0.8) and terms.text == pytest.approx(0.75)
    assert terms.freedom == pytest.approx(0.5)
    assert terms.trade_off == pytest.approx(3 / (1 / 0.5 + 1 / 0.75 + 1 / 0.5))
    two = measured_terms(tallies, {})
    assert two.freedom is None and two.trade_off == pytest.approx(trade_off(0.5, 0.75))


def test_identity_is_at_most_one_per_subject_and_subjects_have_equal_weight() -> None:
    tallies = [_tally("a", 0, 1.0, 1.0), _tally("b", 0, 0.2, 1.0), _tally("b", 1, 0.2, 1.0)]
    assert measured_terms(tallies, {}).identity == pytest.approx((1 + 0.25) / 2)


def test_freedom_that_cannot_be_measured_counts_as_zero_and_its_subject_is_reported() -> None:
    rare = [_tally("a", 0, 0.9, 1.0, Pairs(6, 1, 0.3))]
    terms = measured_terms(rare, {"a": Range(0.3, 0.1)})
    assert terms.trade_off == 0 and terms.unmeasured == ("a",)
    both = measured_terms([*rare, _tally("b", 0, 0.9, 1.0, Pairs(6, 6, 6 * 0.25))], {k: Range(0.3, 0.1) for k in "ab"})
    assert both.freedom == pytest.approx(0.75 / 2) and both.unmeasured == ("a",)


def test_the_terms_intervals_contain_their_values_and_shrink_with_more_prompts() -> None:
    rng = np.random.default_rng(0)
    tallies = [
        _tally(
            "a", i, float(rng.uniform(0.2, 0.7)), float(rng.uniform(0.6, 1)), Pairs(6, 6, float(rng.uniform(0.6, 1.8)))
        )
        for i in range(12)
    ]
    known = {"a": Range(0.3, 0.1)}
    terms, spans = measured_terms(tallies, known), bootstrap_terms(tallies, known, rounds=400)
    for key, (low, high) in spans.items():
        assert low < getattr(terms, key) < high
    more = bootstrap_terms([t for t in tallies for _ in range(8)], known, rounds=400)
    assert more["trade_off"][1] - more["trade_off"][0] < 0.6 * (spans["trade_off"][1] - spans["trade_off"][0])


def test_extreme_results_from_few_prompts_still_have_wide_intervals() -> None:
    low, high = bootstrap_terms([_tally("a", i, 0.0, 1.0) for i in range(10)], {}, rounds=50)["trade_off"]
    assert low == 0 and 0.2 < high < 0.7
    assert all(math.isnan(v) for span in bootstrap_terms([], {}).values() for v in span)
