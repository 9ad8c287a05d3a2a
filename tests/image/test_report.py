"""Evaluations, reports and comparisons of drawn pictures, which replace those of a diffusion model."""

from __future__ import annotations

import colorsys
import csv
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from shared.benchmark.aggregate import Goal
from shared.benchmark.experiment import Experiment, benchmark, compare, pictures
from shared.config import validate
from shared.evaluation.evaluate import Case, KeptPictures, Shots, evaluate
from shared.evaluation.prompt_sets import PromptSet
from shared.metrics.encoders import InstrumentInfo, Instruments
from shared.metrics.report import Report
from shared.metrics.save_report import save_report

# a stand-in world, in which each subject is a square with its own hue on a background of one colour

BACK = {"beach": (0.9, 0.8, 0.5), "snow": (0.95, 0.95, 1.0)}


def _draw(subject: int, background: str, seed: int) -> Tensor:
    """Draws a picture `[3, 32, 32]` with values in [-1, 1]."""
    picture = torch.tensor(BACK[background]).view(3, 1, 1).expand(3, 32, 32).clone()
    hue = torch.tensor(colorsys.hsv_to_rgb(subject / 9, 1.0, 0.9))
    noise = 0.1 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1000 + seed)) - 0.1
    dy, dx = (seed * 5) % 11, (seed * 3) % 13
    size = 8 + seed % 7
    picture[:, 5 + dy : 5 + dy + size, 5 + dx : 5 + dx + size] = hue.view(3, 1, 1)
    return (picture + noise).clamp(0, 1) * 2 - 1


class _Who:
    info = InstrumentInfo("hue of the thing", "which thing it is", True, {"identity": 0.96})

    def images(self, pixels: Tensor) -> Tensor:
        """Returns the mean colour of the pixels that differ from the top row."""
        away = (pixels - pixels[:, :, :1].mean((2, 3), keepdim=True)).norm(dim=1, keepdim=True) > 0.7
        mean = (pixels * away).sum((2, 3)) / away.sum((2, 3)).clamp_min(1)
        return F.normalize(mean - mean.mean(1, keepdim=True), dim=1)


class _Clip(_Who):
    info = InstrumentInfo("toy CLIP", "text alignment", True)

    def images(self, pixels: Tensor) -> Tensor:
        return F.normalize(F.adaptive_avg_pool2d(pixels, 4).flatten(1), dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        return F.normalize(torch.stack([torch.full((48,), 0.1 + ("beach" in t)) for t in texts]), dim=1)


class _Reader:
    info = InstrumentInfo("corner reader", "background", True, {"background": 0.99})

    def read(self, pixels: Tensor) -> dict[str, list[str]]:
        blue = (pixels[:, 2, :4].mean((1, 2)) + 1) / 2
        return {"background": ["snow" if b > 0.85 else "beach" for b in blue.tolist()]}


TOOLS = Instruments(_Clip(), _Who(), _Reader())
PROMPTS = validate(
    PromptSet,
    {
        "name": "two places",
        "prompts": [
            {"text": "a {concept} on the beach", "expects": {"background": "beach"}},
            {"text": "a {concept} in the snow <script>alert(1)</script>", "expects": {"background": "snow"}},
        ],
        "drift": ["a boat on the beach"],
    },
)
REFERENCES = torch.stack([_draw(0, b, s) for b, s in (("beach", 1), ("snow", 2), ("beach", 8), ("snow", 13))])


def _generate(subject: int, spoiled: Sequence[int] = ()):
    """Returns a generator of pictures of a subject, which copies the first reference for seeds in `spoiled`."""

    def generate(prompts: list[str], seeds: list[int], progress: Any = None) -> Tensor:
        out = []
        for text, seed in zip(prompts, seeds, strict=True):
            thing = subject if "boat" not in text else 7
            out.append(REFERENCES[0] if seed in spoiled else _draw(thing, "snow" if "snow" in text else "beach", seed))
        return torch.stack(out)

    return generate


def _case(**changes: object) -> Case:
    gallery = {f"thing {i}": torch.stack([_draw(i, b, s) for b, s in (("beach", 5), ("snow", 6))]) for i in range(1, 9)}
    values: dict = {"name": "my-mug", "class_noun": "mug", "references": REFERENCES, "gallery": gallery}
    return Case(**{**values, "recipe": "dreambooth_lora", "backbone": "toybox", **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reports") / "mug"
    concept = out.parent / "my-mug.concept"
    concept.mkdir()
    (concept / "adapter.safetensors").write_bytes(b"0" * 3000)
    case = _case(concept=concept, training_seconds=65.0, metadata={"kind": "subject", "note": "<b>&"})
    evaluate(_generate(0, [23]), _generate(5), case, PROMPTS, TOOLS, Shots([20, 21, 23], out))
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return Report.load(folder)


def test_an_evaluation_reports_every_denoising_step() -> None:
    def generate(prompts: list[str], seeds: list[int], progress: Any = None) -> Tensor:
        for step in (1, 2):
            progress(len(seeds) * step, len(seeds) * 2)
        return _generate(0)(prompts, seeds)

    calls: list[tuple[str, int, int]] = []
    settings = Shots([1, 2], chunk=3)
    evaluate(generate, generate, _case(), PROMPTS, TOOLS, settings, lambda *what: calls.append(what))
    assert calls[:4] == [("with the concept, denoising steps", done, 8) for done in (3, 6, 7, 8)]
    assert {what for what, done, of in calls if done == of} == {what for what, _, _ in calls} and len(calls) == 12


def test_an_evaluation_measures_what_was_drawn(report: Report) -> None:
    made = report.of_kind("concept")
    assert len(made) == 6 and len(report.of_kind("base")) == 6 and len(report.of_kind("drift")) == 3
    copied = [p for p in made if p.scores["copied"]]
    assert {p.seed for p in copied} == {23} and all("copies reference 1" in p.flags and p.failed for p in copied)
    assert report.value("copied") == pytest.approx(1 / 3)
    assert report.value("identity") == pytest.approx(2 / 3)
    assert report.value("background") == pytest.approx(5 / 6)  # the copy shows the beach, but the prompt asks for snow
    wrong = next(p for p in made if p.prompt == 1 and p.seed == 23)
    assert "background: beach, but the prompt asks for snow" in wrong.flags
    identity = report.score("identity")
    assert identity is not None and identity.base == 0 and identity.chance == pytest.approx(1 / 9)
    assert identity.low is not None and identity.low <= 2 / 3
    assert report.value("trade_off") == pytest.approx(2 * (2 / 3) * (5 / 6) / (2 / 3 + 5 / 6))
    assert report.value("drift") is not None and report.of_kind("drift")[0].scores["drift"] == pytest.approx(
        0, abs=1e-6
    )
    assert (
        report.value(
            "diversity",
        )
        is not None
    )


def test_each_model_gets_the_prompts_in_its_own_wording(report: Report) -> None:
    assert report.of_kind("concept")[0].text == "a <my-mug> on the beach"
    assert report.of_kind("base")[0].text == "a mug on the beach"
    assert report.of_kind("drift")[0].text == "a boat on the beach"


def test_a_report_states_costs_accuracies_and_notes(report: Report) -> None:
    costs = report.costs
    assert costs.concept_bytes == 3000 and costs.training_seconds == 65
    assert costs.seconds_per_picture is not None and costs.seconds_per_picture > 0
    assert costs.peak_memory is not None and costs.peak_memory > 10_000_000
    assert report.toybox and [i.accuracy for i in report.instruments][1:] == [{"identity": 0.96}, {"background": 0.99}]
    (note,) = report.notes
    assert "two terms" in note and "no true pictures" in note
    assert report.prompts[1].failures == 1 and report.prompts[0].scores["recognised"] is not None


def test_a_report_survives_a_json_round_trip_exactly(report: Report, folder: Path, tmp_path: Path) -> None:
    again = Report.load(folder)
    assert again == report and again.to_json() == report.to_json() == (folder / "report.json").read_text()
    save_report(report, tmp_path / "copy")
    for name in ("report.json", "pictures.csv", "prompts.csv", "index.html"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()


def test_the_csv_files_contain_every_picture_and_prompt(report: Report, folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "pictures.csv").read_text())))
    assert len(rows) == len(report.pictures)
    for row, picture in zip(rows, report.pictures, strict=True):
        assert row["kind"] == picture.kind and int(row["seed"]) == picture.seed and row["text"] == picture.text
        assert (folder / row["file"]).is_file()
        for key, value in picture.scores.items():
            assert row[f"score.{key}"] == ("" if value is None else str(value))
    prompts = list(csv.DictReader(io.StringIO((folder / "prompts.csv").read_text())))
    assert [float(p["score.identity"]) for p in prompts] == [p.scores["identity"] for p in report.prompts]


class _Page(HTMLParser):
    """Checks the nesting of a page and collects its pictures and everything that it would load from elsewhere."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        values = dict(attrs)
        if tag == "img":
            self.pictures.append(values)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data", "action")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()


def _checked(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert not re.search(r"https?:|//[a-z]+\.", text)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert all(p.get("alt") for p in page.pictures)
    assert not page.tags & {"script", "iframe", "link", "object"}
    assert 'name="viewport"' in text and "prefers-color-scheme:dark" in text and '<html lang="en">' in text
    return page


def test_the_html_page_is_self_contained_and_escapes_all_text(report: Report, folder: Path) -> None:
    text = (folder / "index.html").read_text()
    page = _checked(text)
    assert len(page.pictures) == len(report.pictures) + len(report.references)
    assert "svg" in page.tags and 'role="img"' in text
    assert "Toy numbers" in text and "copies reference 1" in text and "&lt;script&gt;" in text
    assert "alert(1)</script>" not in text
    for score in report.scores:
        assert score.title in text
    assert "1 min 05 s" in text and "2.9 KiB" in text


def test_large_pictures_are_scaled_down_only_on_the_page(tmp_path: Path) -> None:
    case = _case(references=F.interpolate(REFERENCES, scale_factor=16), gallery=None)
    generate = lambda p, s, _: F.interpolate(_generate(0)(p, s), scale_factor=16)  # noqa: E731
    evaluate(generate, generate, case, PROMPTS.first(1), TOOLS, Shots([20], tmp_path / "r"))
    assert "data:image/jpeg" in (tmp_path / "r" / "index.html").read_text()
    from PIL import Image

    with Image.open(tmp_path / "r" / "pictures" / "concept_00_20.png") as picture:
        assert picture.size == (512, 512)


def test_the_report_notes_a_missing_gallery_reader_or_drift_prompts(tmp_path: Path) -> None:
    prompts = validate(PromptSet, {"name": "x", "prompts": list(PROMPTS.prompts)})
    tools = Instruments(_Clip(), _Who())
    report = evaluate(_generate(0), _generate(5), _case(gallery=None, backbone="sd"), prompts, tools, Shots([20]))
    notes = " ".join(report.notes)
    for what in ("No gallery", "No recognizer", "no drift prompts", "one seed"):
        assert what in notes
    assert report.value("drift") is None and report.value("background") is None and report.value("diversity") is None
    identity = report.score("identity")
    assert identity is not None and identity.unit == "score" and identity.chance is None
    only = evaluate(_generate(0), _generate(5), _case(), prompts, Instruments(identity=_Who()), Shots([20]))
    assert only.value("trade_off") is None and "No CLIP" in " ".join(only.notes)
    from shared.metrics.html import report_html

    _checked(report_html(only))


def test_bad_input_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds"):
        evaluate(_generate(0), _generate(5), _case(), PROMPTS, TOOLS, Shots([]))
    with pytest.raises(ValueError, match="without repeats"):
        evaluate(_generate(0), _generate(5), _case(), PROMPTS, TOOLS, Shots([1, 1]))
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("keep")
    calls: list[int] = []

    def counted(prompts: list[str], seeds: list[int], progress: Any) -> Tensor:
        calls.append(len(prompts))
        return torch.full((len(prompts), 3, 32, 32), float("nan"))

    with pytest.raises(ValueError, match="already exists"):
        evaluate(counted, counted, _case(), PROMPTS, TOOLS, Shots([1], tmp_path / "there"))
    assert not calls
    with pytest.raises(ValueError, match="not finite"):
        evaluate(counted, counted, _case(), PROMPTS, TOOLS, Shots([1], tmp_path / "new"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


def test_damaged_reports_are_refused(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "report.json").read_text())
    cases = {
        "cut": (folder / "report.json").read_text()[:200],
        "version": json.dumps({**raw, "schema_version": 99}),
        "list": "[]",
        "key": json.dumps({**raw, "surprise": 1}),
        "path": json.dumps({**raw, "references": ["../../etc/passwd"]}),
    }
    for name, text in cases.items():
        (tmp_path / f"{name}.json").write_text(text)
        with pytest.raises(ValueError, match=r"JSON|version|surprise|path|lead"):
            Report.load(tmp_path / f"{name}.json")
    with pytest.raises(ValueError, match="no report found"):
        Report.load(tmp_path / "nowhere.json")


# comparisons


def _run(calls: list[tuple[str, str]], fail: set[tuple[str, str]]):
    def run(recipe: str, subject: str, workdir: Path) -> Report:
        calls.append((recipe, subject))
        if (recipe, subject) in fail:
            raise RuntimeError("the loss is not finite")
        thing = {"good": 0, "bad": 3}[recipe]
        return evaluate(_generate(thing), _generate(5), _case(name=subject), PROMPTS, TOOLS, Shots([20, 21]))

    return run


def test_a_comparison_resumes_where_it_stopped(tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []
    fail = {("bad", "s2")}
    both = Experiment({"bad": 1, "good": 2}, ["s1", "s2"], "two", [20, 21])
    first = benchmark(_run(calls, fail), both, tmp_path / "b", pictures())
    assert len(calls) == 4 and first.failures == {("bad", "s2"): "RuntimeError: the loss is not finite"}
    fail.clear()
    second = benchmark(_run(calls, fail), both, tmp_path / "b", pictures())
    assert calls[4:] == [("bad", "s2")] and not second.failures
    third = benchmark(_run(calls, fail), both, tmp_path / "b", pictures())
    assert len(calls) == 5 and third.markdown() == second.markdown() and third.csv() == second.csv()
    for other in (
        Experiment({"good": 2}, ["s1"], "two", [20]),
        Experiment({"good": 3}, ["s1"], "two", [20, 21]),
    ):
        with pytest.raises(ValueError, match="different prompts, seeds, settings"):
            benchmark(_run(calls, fail), other, tmp_path / "b", pictures())
    assert len(calls) == 5


def test_the_table_is_correct_and_sorted(tmp_path: Path) -> None:
    goal = Goal(identity=0.7, over_floor=0.4, background=0.8)
    both = Experiment({"bad": None, "good": None}, ["s1", "s2"], "two", [1])
    comparison = benchmark(_run([], {("bad", "s2")}), both, tmp_path / "b", pictures(goal))
    good, bad = comparison.rows
    assert (good.recipe, bad.recipe) == ("good", "bad")
    assert good.value("identity") == 1 and good.base("identity") == 0 and bad.value("identity") == 0
    assert good.pictures == 8 and bad.subjects == ("s1",)
    assert goal.met(good) is True and goal.met(bad) is False and Goal().met(good) is None
    lines = comparison.markdown().splitlines()
    assert lines[2].startswith("| good | 2 | ") and lines[3].startswith("| bad | 1, 1 failed | ")
    assert len({line.count("|") for line in lines[:4]}) == 1 and "Toy numbers" in comparison.markdown()
    rows = list(csv.DictReader(io.StringIO(comparison.csv())))
    assert [(r["recipe"], r["subject"]) for r in rows] == [
        ("good", ""),
        ("bad", ""),
        ("bad", "s1"),
        ("good", "s1"),
        ("good", "s2"),
        ("bad", "s2"),
    ]
    assert float(rows[0]["identity"]) == 1 and rows[-1]["error"] == "RuntimeError: the loss is not finite"
    text = (tmp_path / "b" / "index.html").read_text()
    _checked(text)
    assert "the loss is not finite" in text and "reached" in text and "missed" in text


def test_comparisons_refuse_mixed_instruments_and_empty_input(report: Report, tmp_path: Path) -> None:
    other = report.model_copy(update={"instruments": report.instruments[:1]})
    with pytest.raises(ValueError, match="different instruments"):
        compare({("a", "s"): report, ("b", "s"): other})
    with pytest.raises(ValueError, match="at least one recipe"):
        Experiment({}, ["s"], "two", [1])
    with pytest.raises(ValueError, match="would share a folder"):
        Experiment({"a b": None, "a_b": None}, ["s"], "two", [1])


def test_evaluations_that_share_kept_pictures_generate_base_pictures_only_once() -> None:
    calls: list[tuple[str, ...]] = []

    def base(texts: list[str], seeds: list[int], progress: Any) -> Tensor:
        calls.append(tuple(texts))
        return _generate(5)(texts, seeds, progress)

    kept: KeptPictures = {}
    first = evaluate(_generate(0), base, _case(), PROMPTS, TOOLS, Shots([1, 2], kept=kept))
    made = len(calls)
    again = evaluate(_generate(0), base, _case(), PROMPTS, TOOLS, Shots([1, 2], kept=kept))
    assert made > 0 and len(calls) == made and again.scores == first.scores
    assert again.costs.base_seconds_per_picture == first.costs.base_seconds_per_picture
    evaluate(_generate(0), base, _case(), PROMPTS, TOOLS, Shots([3], kept=kept))  # different seeds need new pictures
    assert len(calls) > made
