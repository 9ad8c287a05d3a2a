"""Scores against closed forms and against transformers called directly."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from shared.metrics import copying, encoders, instruments, scores, toybox
from shared.metrics.encoders import InstrumentInfo, Instruments
from shared.metrics.scorer import SUBJECT, Scorer


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _pictures(n: int, size: int = 64, seed: int = 0) -> Tensor:
    """Smooth random pictures `[n, 3, size, size]` in [-1, 1]."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True).clamp(0, 1) * 2 - 1


# embeddings


def test_cosine_is_that_of_numpy_and_scale_free() -> None:
    a, b = _random(4, 7), _random(5, 7, seed=1)
    expected = (
        (a.numpy() @ b.numpy().T) / np.linalg.norm(a.numpy(), axis=1)[:, None] / np.linalg.norm(b.numpy(), axis=1)
    )
    np.testing.assert_allclose(scores.cosine(3 * a, b).numpy(), expected, atol=1e-14)
    assert scores.cosine(torch.zeros(1, 7), b).abs().max() == 0


def test_clip_t_is_row_by_row_and_clip_i_is_the_mean_over_references() -> None:
    a, b = _random(4, 7), _random(4, 7, seed=1)
    full = scores.cosine(a, b)
    torch.testing.assert_close(scores.clip_t(a, b), full.diagonal())
    torch.testing.assert_close(scores.clip_i(a, b), full.mean(1))
    torch.testing.assert_close(scores.dino_i(a, a[:1])[0], torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="one text per picture"):
        scores.clip_t(a, b[:2])
    with pytest.raises(ValueError, match="no references"):
        scores.clip_i(a, b[:0])


def test_text_score_is_clipscore() -> None:
    assert scores.text_score(torch.tensor([-0.2, 0.0, 0.2, 0.3, 0.9])).tolist() == pytest.approx([0, 0, 0.5, 0.75, 1])


def test_retrieval_with_synthetic_embeddings() -> None:
    axes = torch.eye(5, dtype=torch.float64)
    gallery = {"me": torch.stack([axes[0], axes[0] + 0.1 * axes[4]]), **{f"d{i}": axes[i : i + 1] for i in (1, 2, 3)}}
    outputs = torch.stack([axes[0], axes[0] + 0.5 * axes[1], axes[1] + 0.5 * axes[0], axes[3]])
    retrieved = scores.retrieve(outputs, gallery, "me")
    assert retrieved.nearest == ("me", "me", "d1", "d3")
    assert retrieved.hits.tolist() == [True, True, False, False]
    assert retrieved.accuracy == 0.5 and retrieved.chance == 0.25
    assert retrieved.margin[0] > retrieved.margin[1] > 0 > retrieved.margin[3]


def test_a_tie_is_no_hit_and_guessing_gives_chance() -> None:
    same = _random(1, 8)
    assert not scores.retrieve(same, {"me": same, "twin": same}, "me").hits.any()
    gallery = {str(i): _random(1, 64, seed=i) for i in range(9)}
    hits = scores.retrieve(_random(4000, 64, seed=99), gallery, "3")
    assert hits.accuracy == pytest.approx(1 / 9, abs=0.03)


def test_retrieval_needs_the_subject_and_a_distractor() -> None:
    with pytest.raises(ValueError, match="at least one other"):
        scores.retrieve(_random(2, 3), {"me": _random(1, 3)}, "me")
    with pytest.raises(ValueError, match="must hold 'me'"):
        scores.retrieve(_random(2, 3), {"a": _random(1, 3), "b": _random(1, 3)}, "me")


def test_diversity_per_group() -> None:
    axes = torch.eye(3, dtype=torch.float64)
    rows = torch.stack([axes[0], axes[0], axes[0], axes[1], axes[2], axes[2]])
    diversity = scores.diversity(rows, ["same", "same", "mixed", "mixed", "mixed", "alone"])
    assert diversity == pytest.approx({"same": 0.0, "mixed": 1.0})


def test_drift_is_zero_without_change() -> None:
    a = _random(5, 16)
    assert scores.drift(a, a.clone()).abs().max() < 1e-12
    assert scores.drift(a, -a).tolist() == pytest.approx([2.0] * 5)


def test_attribute_hits() -> None:
    seen = {"background": ["beach", "snow"], "view": ["front", "side"]}
    expected = [{"background": "beach", "view": "back"}, {}]
    assert scores.attribute_hits(expected, seen) == [{"background": True, "view": False}, {}]
    with pytest.raises(ValueError, match="unknown attribute 'weather'; there are: background, view"):
        scores.attribute_hits([{"weather": "rain"}, {}], seen)


def test_kid_is_the_double_sum_of_the_paper() -> None:
    x, y = _random(5, 4), _random(6, 4, seed=1)
    k = lambda u, v: (float(u @ v) / 4 + 1) ** 3  # noqa: E731
    xx = sum(k(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    yy = sum(k(y[i], y[j]) for i in range(6) for j in range(6) if i != j) / 30
    xy = sum(k(u, v) for u in x for v in y) / 30
    assert scores.kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_kid_is_unbiased_on_one_distribution_and_grows_with_distance() -> None:
    values = [scores.kid(_random(40, 8, seed=2 * i), _random(40, 8, seed=2 * i + 1)) for i in range(200)]
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0
    far = [scores.kid(_random(40, 8), _random(40, 8, seed=1) + shift) for shift in (0.5, 1.0, 2.0)]
    assert 0 < far[0] < far[1] < far[2]
    with pytest.raises(ValueError, match="at least 2"):
        scores.kid(_random(1, 4), _random(5, 4))


def test_trade_off() -> None:
    assert scores.trade_off(0.6, 0.6) == pytest.approx(0.6)
    assert scores.trade_off(1.0, 0.5) == pytest.approx(2 / 3)
    assert scores.trade_off(0.0, 1.0) == scores.trade_off(-0.3, 1.0) == scores.trade_off(0.0, 0.0) == 0.0
    assert scores.trade_off(1.7, 1.0) == 1.0


# intervals


def test_bootstrap_matches_the_normal_interval() -> None:
    values = _random(400).tolist()
    low, high = scores.bootstrap(values)
    half = 1.96 * np.std(values) / 20
    assert low == pytest.approx(np.mean(values) - half, abs=0.02)
    assert high == pytest.approx(np.mean(values) + half, abs=0.02)
    assert (low, high) == scores.bootstrap(values)


def test_bootstrap_draws_clusters_whole() -> None:
    means = _random(20)
    values = means.repeat_interleave(50).tolist()
    clusters = [i for i in range(20) for _ in range(50)]
    alone, together = (scores.bootstrap(values, c) for c in (None, clusters))
    assert together[1] - together[0] > 4 * (alone[1] - alone[0])


def test_bootstrap_of_nothing_of_nan_and_of_certainty() -> None:
    assert all(math.isnan(v) for v in scores.bootstrap([]))
    assert all(math.isnan(v) for v in scores.bootstrap([math.nan]))
    assert scores.bootstrap([0.25, 0.25, math.nan]) == (0.25, 0.25)
    low, high = scores.bootstrap([1.0] * 20, [i // 2 for i in range(20)])
    assert high == 1.0 and low == pytest.approx(scores.wilson(10, 10)[0]) and 0.6 < low < 0.8
    low, high = scores.bootstrap_trade_off([0.0] * 10, [1.0] * 10, range(10))
    assert low == 0 and 0.2 < high < 0.6


def test_wilson_against_its_published_example() -> None:
    # Newcombe (1998), table I: 81 of 263 and 1 of 29, 95 %.
    assert scores.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert scores.wilson(1, 29) == pytest.approx((0.0061, 0.1718), abs=1e-4)


# copying


def _embed(pixels: Tensor) -> Tensor:
    return F.normalize(F.adaptive_avg_pool2d(pixels, 4).flatten(1), dim=1)


def _copied(outputs: Tensor, references: Tensor) -> list[bool]:
    limits = copying.calibrate(references, _embed(references))
    return copying.find_copies(outputs, _embed(outputs), references, _embed(references), limits).copied.tolist()


def test_exact_noisy_shifted_and_mirrored_copies_are_found() -> None:
    references = _pictures(4)
    exact = references[1:2]
    noisy = (exact + 0.05 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    dim = exact * 0.8
    assert _copied(torch.cat([exact, noisy, dim]), references) == [True, True, True]
    shifted = torch.roll(exact, (4, -3), (2, 3))
    similarity = copying.aligned_similarity(torch.cat([shifted, exact.flip(3)]), references)
    assert similarity[:, 1].min() > 0.97
    zoomed = F.interpolate(exact[:, :, 4:60, 4:60], size=(64, 64), mode="bicubic").clamp(-1, 1)
    assert copying.aligned_similarity(zoomed, references)[0, 1] > 0.97


def test_new_pictures_are_no_copies_and_the_nearest_is_named() -> None:
    references = _pictures(4)
    fresh = _pictures(30, seed=7)
    assert not any(_copied(fresh, references))
    limits = copying.calibrate(references, _embed(references))
    copies = copying.find_copies(references, _embed(references), references, _embed(references), limits)
    assert copies.nearest.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(copies.pixel, torch.ones(4, dtype=torch.float64))


def test_alike_references_raise_the_limit() -> None:
    base = _pictures(1)
    alike = torch.cat([base, (base + 0.5 * _pictures(1, seed=3)).clamp(-1, 1)])
    strict, loose = (copying.calibrate(r, _embed(r)) for r in (alike, _pictures(4)))
    assert strict.pixel > loose.pixel >= copying.PIXEL_FLOOR
    assert copying.calibrate(base, _embed(base)) == copying.CopyLimits(copying.PIXEL_DEFAULT, copying.EMBED_DEFAULT, 0)
    doubled = copying.calibrate(base.repeat(3, 1, 1, 1), _embed(base.repeat(3, 1, 1, 1)))
    assert doubled.pixel <= 0.98  # references given twice do not switch the check off


def test_aligned_similarity_is_the_plain_correlation_where_nothing_moves() -> None:
    a, b = _pictures(1, 32), _pictures(1, 32, seed=1)
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
    assert copying.aligned_similarity(flat, torch.cat([flat, _pictures(1)])).abs().max() == 0


# instruments


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-clip"
    symbols = [chr(c) for c in range(97, 123)]
    vocab = {s: i for i, s in enumerate([*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=12)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(vocab),
        "max_position_embeddings": 12,
        "bos_token_id": 52,
        "eos_token_id": 53,
        "pad_token_id": 53,
    }
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=10)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**cast(Any, size)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("models") / "tiny-dino"
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}}
    BitImageProcessorPil(**cast(Any, size)).save_pretrained(folder)
    return folder


def test_clip_equals_transformers_called_directly(clip_folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pixels = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(1)) * 2 - 1
    texts = ["a cat", "dog on a mat"]
    encoder = encoders.load_clip(clip_folder)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    pictures = [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    processor, tokenizer = (
        CLIPImageProcessorPil.from_pretrained(clip_folder),
        CLIPTokenizer.from_pretrained(clip_folder),
    )
    with torch.no_grad():
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        both = cast(Any, model)(**tokens, pixel_values=processor(pictures, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(encoder.images(pixels), both.image_embeds)
    torch.testing.assert_close(encoder.texts(texts), both.text_embeds)
    torch.testing.assert_close(
        encoder.images(pixels) @ encoder.texts(texts).T * model.logit_scale.exp(), both.logits_per_image
    )


def test_clip_says_when_a_text_is_cut(clip_folder: Path) -> None:
    with pytest.warns(UserWarning, match="reads 12 tokens"):
        encoders.load_clip(clip_folder).texts(["a very long prompt indeed"])


def test_dino_is_the_cls_embedding(dino_folder: Path) -> None:
    from transformers import BitImageProcessorPil, Dinov2Model

    pixels = _pictures(2, 50)
    pictures = [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pixels]
    values = BitImageProcessorPil.from_pretrained(dino_folder)(pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = Dinov2Model.from_pretrained(dino_folder).eval()(values).last_hidden_state
    torch.testing.assert_close(encoders.load_dino(dino_folder).images(pixels), F.normalize(hidden[:, 0], dim=1))


@pytest.mark.parametrize("old", ["CLIPFeatureExtractor", "CLIPImageProcessor", "CLIPImageProcessorFast"])
def test_old_and_fast_processor_names_load_without_torchvision(clip_folder: Path, tmp_path: Path, old: str) -> None:
    import shutil

    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    path = folder / "preprocessor_config.json"
    raw = json.loads(path.read_text())
    raw.pop("image_processor_type", None)
    raw["feature_extractor_type" if "Feature" in old else "image_processor_type"] = old
    path.write_text(json.dumps(raw))
    pixels = _pictures(1, 40)
    torch.testing.assert_close(
        encoders.load_clip(folder).images(pixels), encoders.load_clip(clip_folder).images(pixels)
    )


def test_wrong_folders_are_refused_by_name(clip_folder: Path, dino_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a model folder"):
        encoders.load_clip(tmp_path)
    with pytest.raises(ValueError, match="'dinov2'; expected clip"):
        encoders.load_clip(dino_folder)
    with pytest.raises(ValueError, match="'clip'; expected dinov2"):
        encoders.load_dino(clip_folder)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        encoders.load_dino(tmp_path)
    with pytest.raises(ValueError, match="nothing to measure with"):
        instruments.load_instruments()


def test_pictures_are_checked_and_cut_to_the_middle() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encoders.to_pil(torch.full((1, 3, 4, 4), math.nan))
    with pytest.raises(ValueError, match=r"expected \[N, 3, H, W\]"):
        encoders.to_pil(torch.zeros(3, 4, 4))
    wide = torch.cat([torch.full((1, 3, 8, 4), -1.0), torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 4), 1.0)], 3)
    assert encoders.resize01(wide, 8).unique().tolist() == pytest.approx([128 / 255])


def test_accuracies_come_from_the_card_after_the_round_trip(tmp_path: Path) -> None:
    assert toybox.toybox_accuracy(tmp_path / "none.json") == {}
    ways = {"clean": {"class": 0.99, "style_shown": 0.9}, "vae": {"class": 0.97, "style_shown": 0.8, "main": 0.5}}
    card = {"accuracies": {"recognizer": ways, "identity_reporting": {"clean": {"retrieval": 0.96}}}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    accuracies = toybox.toybox_accuracy(tmp_path / "card.json")
    assert accuracies["recognizer"] == {"class": 0.97, "style": 0.8}
    assert list(accuracies["identity"].values()) == [0.96] and accuracies["clip"] == {}


# the scorer


class _Pool:
    """A tiny encoder with known behaviour: the mean colours of a grid."""

    info = InstrumentInfo("pool", "test")

    def images(self, pixels: Tensor) -> Tensor:
        return _embed(pixels)


class _PoolText(_Pool):
    def texts(self, texts: Sequence[str]) -> Tensor:
        self.asked = list(texts)
        return F.normalize(_random(len(texts), 48, seed=5), dim=1)


class _Reader:
    info = InstrumentInfo("reader", "test")

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        return {"background": ["beach"] * len(pixels), "view": ["front"] * len(pixels)}


def test_scorer_counts_copies_as_failures_and_names_the_class() -> None:
    references, text = _pictures(4), _PoolText()
    gallery = {f"other {i}": _pictures(3, seed=20 + i) for i in range(8)}
    scorer = Scorer(references, Instruments(text, _Pool()), "mug", "my-mug", gallery)
    near = (0.75 * references[:1] + 0.25 * references[1:2]).clamp(-1, 1)
    outputs = torch.cat([references[:1], near, gallery["other 3"][:1]])
    measured = scorer.measure(outputs, ["a <my-mug>", "a {concept}", "a mug"])
    assert text.asked == ["a mug"] * 3
    assert scorer.chance == pytest.approx(1 / 9)
    assert (
        measured.scores["recognised"][0] == 1
        and measured.scores["copied"][0] == 1
        and measured.scores["identity"][0] == 0
    )
    assert measured.nearest[1] == SUBJECT and measured.nearest[2] == "other 3"
    assert measured.scores["identity"] == [
        r * (1 - c) for r, c in zip(measured.scores["recognised"], measured.scores["copied"], strict=True)
    ]


def test_scorer_score_prefers_the_subject_and_the_prompt() -> None:
    references = _pictures(4)
    near = (0.5 * references[:1] + 0.5 * references[1:2]).clamp(-1, 1)
    tools = Instruments(_PoolText(), _Pool(), _Reader())
    expects = {"a mug on the beach": {"background": "beach"}, "a mug in the snow": {"background": "snow"}}
    scorer = Scorer(references, tools, "mug", "m", expects=expects)
    beach = scorer(near, ["a <m> on the beach"])
    assert beach["attributes"] == beach["text"] == beach["background"] == 1
    assert beach["score"] == pytest.approx(scores.trade_off(beach["identity"], 1.0))
    assert scorer(near, ["a <m> in the snow"])["score"] == 0
    assert scorer(_pictures(1, seed=50), ["a <m> on the beach"])["score"] < beach["score"]
    assert scorer(references[:1], ["a <m> on the beach"])["score"] == 0
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        scorer.measure(near, ["a", "b"])


def test_scorer_needs_references_and_an_encoder() -> None:
    with pytest.raises(ValueError, match="no references"):
        Scorer(torch.zeros(0, 3, 8, 8), Instruments(identity=_Pool()))
    with pytest.raises(ValueError, match="at least one image encoder"):
        Scorer(_pictures(1), Instruments())
    only = Scorer(_pictures(3), Instruments(identity=_Pool()))
    measured = only(_pictures(2, seed=4), ["x", "y"])
    assert "text" not in measured and measured["score"] == measured["identity"]
