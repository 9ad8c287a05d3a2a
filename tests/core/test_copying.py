"""Copies of the references are found, and new pictures are not mistaken for copies."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics import copying
from tests.core.smooth_pictures import embed, smooth_pictures


def _copied(outputs: Tensor, references: Tensor) -> list[bool]:
    limits = copying.calibrate(references, embed(references))
    return copying.find_copies(outputs, embed(outputs), references, embed(references), limits).copied.tolist()


def test_exact_noisy_shifted_and_mirrored_copies_are_found() -> None:
    references = smooth_pictures(4)
    exact = references[1:2]
    noisy = (exact + 0.05 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    dim = exact * 0.8
    assert _copied(torch.cat([exact, noisy, dim]), references) == [True, True, True]
    shifted = torch.roll(exact, (4, -3), (2, 3))
    similarity = copying.aligned_similarity(torch.cat([shifted, exact.flip(3)]), references)
    assert similarity[:, 1].min() > 0.97
    zoomed = F.interpolate(exact[:, :, 4:60, 4:60], size=(64, 64), mode="bicubic").clamp(-1, 1)
    assert copying.aligned_similarity(zoomed, references)[0, 1] > 0.97


def test_new_pictures_are_not_copies_and_the_nearest_reference_is_reported() -> None:
    references = smooth_pictures(4)
    fresh = smooth_pictures(30, seed=7)
    assert not any(_copied(fresh, references))
    limits = copying.calibrate(references, embed(references))
    copies = copying.find_copies(references, embed(references), references, embed(references), limits)
    assert copies.nearest.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(copies.pixel, torch.ones(4, dtype=torch.float64))


def test_similar_references_raise_the_limit() -> None:
    base = smooth_pictures(1)
    alike = torch.cat([base, (base + 0.5 * smooth_pictures(1, seed=3)).clamp(-1, 1)])
    strict, loose = (copying.calibrate(r, embed(r)) for r in (alike, smooth_pictures(4)))
    assert strict.pixel > loose.pixel >= copying.PIXEL_FLOOR
    assert copying.calibrate(base, embed(base)) == copying.CopyLimits(copying.PIXEL_DEFAULT, copying.EMBED_DEFAULT, 0)
    doubled = copying.calibrate(base.repeat(3, 1, 1, 1), embed(base.repeat(3, 1, 1, 1)))
    assert doubled.pixel <= 0.98  # duplicate references do not disable the check


def test_aligned_similarity_is_the_best_correlation_over_shifts_and_mirroring() -> None:
    a, b = smooth_pictures(1, 32), smooth_pictures(1, 32, seed=1)
    m, s = copying.MARGIN, 32 - 2 * copying.MARGIN
    best = -1.0
    for flipped in (a, a.flip(3)):
        patch = flipped[0, :, m : m + s, m : m + s].double()
        for y in range(2 * m + 1):
            for x in range(2 * m + 1):
                window = b[0, :, y : y + s, x : x + s].double()
                p, w = (v - v.mean((1, 2), keepdim=True) for v in (patch, window))
                best = max(best, float((p * w).sum() / (p.norm() * w.norm())))
    assert float(copying.aligned_similarity(a, b)) >= best - 1e-9
    zooms, copying.ZOOMS = copying.ZOOMS, (1.0,)
    try:
        assert float(copying.aligned_similarity(a, b)) == pytest.approx(best, abs=1e-9)
    finally:
        copying.ZOOMS = zooms


def test_flat_pictures_resemble_nothing() -> None:
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert copying.aligned_similarity(flat, torch.cat([flat, smooth_pictures(1)])).abs().max() == 0
