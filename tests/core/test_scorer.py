"""Tests how a scorer scores pictures, and which accuracies are read for its instruments."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.metrics import scores, toybox
from shared.metrics.encoders import InstrumentInfo, Instruments
from shared.metrics.scorer import Scorer
from shared.metrics.stand_ins import FLOOR
from shared.metrics.verification import SUBJECT
from tests.core.smooth_pictures import drawn, embed, smooth_pictures


def test_accuracies_on_vae_reconstructions_are_preferred_when_the_card_is_read(tmp_path: Path) -> None:
    assert toybox.toybox_accuracy(tmp_path / "none.json") == {}
    ways = {"clean": {"class": 0.99, "style_shown": 0.9}, "vae": {"class": 0.97, "style_shown": 0.8, "main": 0.5}}
    card = {"accuracies": {"recognizer": ways, "identity_reporting": {"clean": {"retrieval": 0.96}}}}
    (tmp_path / "card.json").write_text(json.dumps(card))
    accuracies = toybox.toybox_accuracy(tmp_path / "card.json")
    assert accuracies["recognizer"] == {"class": 0.97, "style": 0.8}
    assert list(accuracies["identity"].values()) == [0.96] and accuracies["clip"] == {}


class _Pool:
    """A tiny encoder with known behaviour. It represents a picture by the mean colour of each cell in a grid."""

    info = InstrumentInfo("pool", "test")

    def images(self, pixels: Tensor) -> Tensor:
        return embed(pixels)


class _PoolText(_Pool):
    def texts(self, texts: Sequence[str]) -> Tensor:
        self.asked = list(texts)
        return F.normalize(drawn(len(texts), 48, seed=5), dim=1)


class _Reader:
    info = InstrumentInfo("reader", "test")

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        return {"background": ["beach"] * len(pixels), "view": ["front"] * len(pixels)}


def test_the_scorer_counts_copies_as_failures_and_replaces_the_concept_with_its_class_in_prompts() -> None:
    references, text = smooth_pictures(4), _PoolText()
    gallery = {f"other {i}": smooth_pictures(3, seed=20 + i) for i in range(8)}
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


def test_the_score_is_higher_for_the_right_subject_and_prompt() -> None:
    references = smooth_pictures(4)
    near = (0.5 * references[:1] + 0.5 * references[1:2]).clamp(-1, 1)
    tools = Instruments(_PoolText(), _Pool(), _Reader())
    expects = {"a mug on the beach": {"background": "beach"}, "a mug in the snow": {"background": "snow"}}
    scorer = Scorer(references, tools, "mug", "m", expects=expects)
    beach = scorer(near, ["a <m> on the beach"])
    assert beach["attributes"] == beach["text"] == beach["background"] == 1
    assert beach["score"] == pytest.approx(scores.trade_off(beach["stand_in_identity"], 1.0))
    assert beach["stand_in_identity"] == pytest.approx(beach["identity_i"])
    snow = scorer(near, ["a <m> in the snow"])
    assert snow["score"] == pytest.approx(scores.trade_off(beach["stand_in_identity"], FLOOR))
    assert scorer(smooth_pictures(1, seed=50), ["a <m> on the beach"])["score"] < beach["score"]
    assert scorer(references[:1], ["a <m> on the beach"])["score"] == pytest.approx(scores.trade_off(FLOOR, 1.0))
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        scorer.measure(near, ["a", "b"])


def test_the_scorer_needs_references_and_an_encoder() -> None:
    with pytest.raises(ValueError, match="no references"):
        Scorer(torch.zeros(0, 3, 8, 8), Instruments(identity=_Pool()))
    with pytest.raises(ValueError, match="at least one image encoder"):
        Scorer(smooth_pictures(1), Instruments())
    only = Scorer(smooth_pictures(3), Instruments(identity=_Pool()))
    measured = only(smooth_pictures(2, seed=4), ["x", "y"])
    assert "text" not in measured and measured["score"] == pytest.approx(max(FLOOR, measured["stand_in_identity"]))
