"""Verified identity, freedom and the three-term trade-off for a subject whose true pictures are known."""

from __future__ import annotations

import colorsys
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.benchmark.experiment import compare
from shared.config import validate
from shared.evaluation.evaluate import Case, Shots, evaluate
from shared.evaluation.prompt_sets import PromptSet
from shared.metrics import measure_true
from shared.metrics.encoders import CropSettings, InstrumentInfo, Instruments
from shared.metrics.html import report_html
from shared.metrics.report import Report
from shared.metrics.scorer import Scorer

# A world of shaded squares, in which the hue identifies the subject and the brighter side shows its pose.
BACK = {"beach": (0.9, 0.8, 0.5), "snow": (0.95, 0.95, 1.0)}
BEYOND = 0.55  # distance from the background's colour beyond which a pixel belongs to the subject


def _draw(hue: float, turn: float, background: str, seed: int) -> Tensor:
    """Draws a picture `[3, 32, 32]` with values in [-1, 1].

    `turn` counts quarter turns. The square is brightest at the top for 0, on the right for 1, and at the bottom for 2.
    """
    rng = np.random.default_rng([seed, 5])
    picture = torch.tensor(BACK[background]).view(3, 1, 1).expand(3, 32, 32).clone()
    color = torch.tensor(colorsys.hsv_to_rgb(hue, 1.0, 0.9)).view(3, 1, 1)
    step, angle = torch.linspace(-1, 1, 12), turn * math.pi / 2
    along = math.sin(angle) * step[None, :] - math.cos(angle) * step[:, None]
    y, x = (int(v) for v in rng.integers(2, 18, 2))
    picture[:, y : y + 12, x : x + 12] = color * (0.65 + 0.35 * (4 * along).tanh())
    noise = torch.from_numpy(rng.normal(0, 0.02, (3, 32, 32))).float()
    return (picture + noise).clamp(0, 1) * 2 - 1


def _away(pixels: Tensor) -> Tensor:
    return ((pixels - pixels[:, :, :1].mean((2, 3), keepdim=True)).norm(dim=1) > 2 * BEYOND).float()


class _Who:
    info = InstrumentInfo("hue of the thing", "which thing it is", True, fingerprint="hue")

    def images(self, pixels: Tensor) -> Tensor:
        mask = _away(pixels)[:, None]
        mean = (pixels * mask).sum((2, 3)) / mask.sum((2, 3)).clamp_min(1)
        return F.normalize(mean - mean.mean(1, keepdim=True), dim=1)


class _Grid:
    info = InstrumentInfo("grid", "text alignment", True, fingerprint="grid")

    def images(self, pixels: Tensor) -> Tensor:
        grid = F.adaptive_avg_pool2d(pixels, 4).mean(1).flatten(1)
        return F.normalize(grid - grid.mean(1, keepdim=True), dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.ones(len(texts), 16), dim=1)


def _lighter_half(grey: Tensor, mask: Tensor) -> str:
    """Returns "front" if the subject is brighter above its middle than below it, and "back" otherwise."""
    rows = mask.any(1).nonzero()[:, 0]
    middle = int(rows.float().mean()) if len(rows) else 16
    above, below = (
        float((grey * mask)[at].sum() / mask[at].sum().clamp_min(1)) for at in (slice(0, middle), slice(middle, 32))
    )
    return "front" if above > below else "back"


class _Reader:
    info = InstrumentInfo("corner reader", "background", True, fingerprint="corner")

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        blue = (pixels[:, 2, :2].mean((1, 2)) + 1) / 2
        top = pixels.mean(1)
        views = [_lighter_half(t, m) for t, m in zip(top, _away(pixels), strict=True)]
        return {"background": ["snow" if b > 0.75 else "beach" for b in blue.tolist()], "view": views}

    def where(self, pixels: Tensor) -> Tensor:
        return _away(pixels)

    def faces(self, pixels: Tensor) -> Tensor:
        return torch.tensor([v == "front" for v in self.read(pixels)["view"]])


READER = _Reader()
TOOLS = Instruments(_Grid(), _Who(), READER, locator=READER, pose=_Grid(), crops=CropSettings(1.1), face_finder=READER)
PROMPTS = validate(
    PromptSet,
    {
        "name": "two places",
        "prompts": [
            {"text": "a {concept} on the beach", "expects": {"background": "beach"}},
            {"text": "a {concept} in the snow", "expects": {"background": "snow"}},
        ],
    },
)


class _Square:
    """The true subject in the world of squares."""

    key = "square"

    def __init__(self) -> None:
        self.drawn = 0

    def pictures(self, asked: Sequence[Mapping[str, str]], seed: int, pose: int | None = None) -> Tensor:
        self.drawn += len(asked)
        rng = np.random.default_rng([seed, 1])
        turns = [float(rng.uniform(0, 4)) if pose is None else pose * 0.7 for _ in asked]
        places = [a.get("background", "beach") for a in asked]
        return torch.stack(
            [_draw(0.0, t, p, 1000 * seed + i) for i, (t, p) in enumerate(zip(turns, places, strict=True))]
        )


def _paint(hue: float, turn: float | None = None, every_second: float | None = None):
    """Returns a model that draws squares of the given hue. If `turn` is None, the seed determines it.

    If `every_second` is given, pictures with odd seeds have that hue instead.
    """

    def generate(prompts: list[str], seeds: list[int], progress: Any = None) -> Tensor:
        out = []
        for text, seed in zip(prompts, seeds, strict=True):
            shown = every_second if every_second is not None and seed % 2 else hue
            place = "snow" if "snow" in text else "beach"
            out.append(
                _draw(shown, seed % 4 + 0.4 if turn is None else turn, place, 77 + seed + 100 * ("snow" in text))
            )
        return torch.stack(out)

    return generate


REFERENCES = torch.stack([_draw(0.0, t, b, s) for t, b, s in ((0, "beach", 1), (1, "snow", 2), (2, "beach", 3))])


def _case(**changes: Any) -> Case:
    gallery = {
        f"thing {i}": torch.stack([_draw(i / 9, t, b, 50 + t) for t, b in ((0, "beach"), (1, "snow"), (3, "beach"))])
        for i in range(1, 9)
    }
    values: dict[str, Any] = {"name": "my-mug", "class_noun": "mug", "references": REFERENCES, "gallery": gallery}
    return Case(**{**values, "true": _Square(), "toy": True, **changes})


@pytest.fixture(autouse=True)
def fewer_true_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_true, "BEHIND", 40)


def _report(generate: Any, case: Case | None = None, **settings: Any) -> Report:
    return evaluate(generate, _paint(0.5), case or _case(), PROMPTS, TOOLS, Shots([0, 1], **settings))


def test_freedom_is_high_if_the_model_varies_the_pose_and_low_if_it_does_not(tmp_path: Path) -> None:
    free, rigid = _report(_paint(0.0), out=tmp_path / "free"), _report(_paint(0.0, 1.4))
    for report in (free, rigid):
        assert report.terms == ("identity", "text", "freedom") and not report.apart
        identity = report.score("identity")
        assert identity is not None and identity.truth is not None and identity.truth > 0.75
        verified = [p.scores["verified"] for p in report.of_kind("concept")]
        expected = min(1, sum(v or 0 for v in verified) / 4 / identity.truth)
        assert identity.value == pytest.approx(expected) and identity.value > 0.7
        assert identity.base == 0
    assert (free.value("freedom") or 0) > 0.8 and (free.value("trade_off") or 0) > 0.9
    assert rigid.value("freedom") == pytest.approx(0, abs=0.1) and (rigid.value("trade_off") or 0) < 0.25
    assert (free.value("views") or 0) > (rigid.value("views") or 0)
    further = free.of_kind("freedom")
    assert {p.seed for p in further} == {2, 3} and len(further) == 4, (
        "every prompt that leaves the pose open has four seeds"
    )
    assert len(free.of_kind("concept")) == 4 and len(free.of_kind("base")) == 4
    again = Report.load(tmp_path / "free")
    assert again == free and again.truth is not None and again.truth.range is not None
    page = report_html(free)
    assert (
        "Freedom" in page and page.count("<svg") == 1 and "freedom 0" in page.lower()
    ) or "freedom 1" in page.lower()


def test_freedom_is_not_measured_if_every_second_picture_shows_another_subject() -> None:
    report = _report(_paint(0.0, None, 0.4))
    freedom = report.score("freedom")
    assert freedom is not None and freedom.value is None and report.value("trade_off") == 0
    assert "not measured" in report_html(report)


def test_a_copied_subject_on_another_background_counts_as_a_copy() -> None:
    def generate(prompts: list[str], seeds: list[int], progress: Any = None) -> Tensor:
        out = []
        for text, seed in zip(prompts, seeds, strict=True):
            reference = REFERENCES[seed % 2 * 2]
            empty = _draw(0.0, 0, "snow" if "snow" in text else "beach", seed)
            background = torch.where(_away(empty[None])[0] > 0, empty[:, :1, :1].expand_as(empty), empty)
            out.append(torch.where(_away(reference[None])[0] > 0, reference, background))
        return torch.stack(out)

    scorer_case = _case()
    report = _report(generate, scorer_case)
    limit = report.truth.pasted if report.truth else None
    assert limit is not None
    made = report.of_kind("concept")
    assert all((p.scores["copy_thing"] or 0) > 0.95 for p in made)


def test_figures_for_true_pictures_are_cached_by_their_inputs(tmp_path: Path) -> None:
    first, second = _Square(), _Square()
    reports = [_report(_paint(0.0), _case(true=thing, cache=tmp_path)) for thing in (first, second)]
    assert first.drawn >= 80 and second.drawn == 0 and reports[0].truth == reports[1].truth
    (kept,) = (tmp_path / "true-figures").iterdir()
    assert json.loads(kept.read_text())["bars"]
    third = _Square()
    _report(_paint(0.0), _case(true=third, cache=tmp_path, references=REFERENCES[:2]))
    assert third.drawn > 0, "different references need new figures"
    kept.write_text("{")
    fourth = _Square()
    _report(_paint(0.0), _case(true=fourth, cache=tmp_path))
    assert fourth.drawn > 0, "figures from a damaged file are measured again"


def test_the_trade_off_has_two_terms_for_a_style_or_without_true_pictures() -> None:
    for case, why in ((_case(true=None), "no true pictures"), (_case(kind="style"), "a style has no pose")):
        report = _report(_paint(0.0), case)
        assert report.terms == ("identity", "text") and report.score("freedom") is None
        assert any("two terms" in n and why in n for n in report.notes)
        trade_off = report.score("trade_off")
        assert trade_off is not None and "two competing goals" in trade_off.explanation
        assert not report.of_kind("freedom") and report.value("diversity") is not None
    alone = _report(_paint(0.0), _case(true=None, gallery=None))
    likeness = alone.score("identity_i")
    assert likeness is not None and likeness.among_low is not None and likeness.among_high is not None
    assert likeness.among_low <= likeness.among_high <= 1
    assert "each reference against the others" in report_html(alone).lower()


def test_subjects_that_the_instruments_cannot_verify_are_shown_separately() -> None:
    good = _report(_paint(0.0))
    identity = good.score("identity")
    assert identity is not None
    scores = [s.model_copy(update={"truth": 0.4}) if s.key == "identity" else s for s in good.scores]
    poor = good.model_copy(update={"scores": scores})
    comparison = compare({("a", "s1"): good, ("a", "s2"): poor})
    assert comparison.apart == {"s2": 0.4} and comparison.rows[0].pictures == 4
    assert "Shown apart" in comparison.markdown() and "s2 (40%)" in comparison.markdown()
    assert "Shown apart" in comparison.html() and comparison.three
    assert "Freedom" in comparison.markdown().splitlines()[0]
    lines = comparison.csv().splitlines()
    assert len(lines) == 4, "the header, the pooled line, and one line for each subject"
    two = _report(_paint(0.0), _case(true=None))
    with pytest.raises(ValueError, match="different terms"):
        compare({("a", "s1"): good, ("a", "s2"): two})


def test_faces_are_scored_only_in_pictures_that_show_one() -> None:
    """In the world of squares, a square is seen from the front if its upper half is brighter."""
    tools = TOOLS
    scorer = Scorer(REFERENCES, tools, "face", "me", _case().gallery)
    pictures = torch.stack([_draw(0.0, 0.4, "snow", 4), _draw(0.0, 2.5, "snow", 4), _draw(0.0, 2.5, "snow", 4)])
    seen = tools.face_finder.faces(pictures).tolist() if tools.face_finder else []
    expects = [{}, {}, {"view": "back"}]
    measured = scorer.measure(pictures, ["a face"] * 3, expects)
    assert measured.scores["no_face"] == [float(not s) for s in seen]
    for face, asked, identity in zip(seen, expects, measured.scores["identity"], strict=True):
        if face:
            assert identity == 1
        else:
            assert math.isnan(identity) if asked else identity == 0
    assert False in seen and True in seen
    mug = replace(scorer, class_noun="mug").measure(pictures, ["a mug"] * 3, expects)
    assert "no_face" not in mug.scores and mug.scores["identity"] == [1, 1, 1]
