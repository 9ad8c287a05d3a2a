"""Tests the cells, tables, resumed runs and refusals of `pcs 3d benchmark` on the toybox with almost no training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from pcs_3d.benchmark.asset_cell import AssetCell
from pcs_3d.benchmark.asset_rows import AssetGoal, aggregate_assets
from pcs_3d.benchmark.asset_table import compare_assets
from pcs_3d.benchmark.toybox_assets import make_once
from pcs_3d.evaluation.asset_report import AssetReport, Curve
from pcs_3d.evaluation.shape_scores import Geometry
from pcs_3d.recipe import Recipe3D
from pcs_3d.runner import Runner3D
from shared.metrics.report import Instrument, Score
from shared.recipe.resolve import load

pytestmark = pytest.mark.usefixtures("few_true_pictures")

SETTINGS = (
    "train.steps=1", "train.batch_size=1", "field.resolution=12", "export.resolution=16", "export.faces=100",
    "export.picture=32", "export.frames=8", "export.texture=64",
)  # fmt: skip
SMALL = (
    "--subjects", "1", "--learn", "textual_inversion", "--set-learn", "train.steps=1",
    "--set-learn", "train.validation.every=0", "--set-learn", "preview.num=0",
    *(part for setting in SETTINGS for part in ("--set", setting)),
)  # fmt: skip
GIVEN = "texture_personalization"  # a recipe that needs a mesh, which the benchmark provides


def test_a_recipe_is_compared_with_itself_without_the_concept_and_failures_are_named(pcs, tmp_path: Path):
    (tmp_path / "empty.yaml").write_text("base: hifa\nexport: {threshold: 1.0e6}\n")
    out = tmp_path / "table"
    arguments = ("3d", "benchmark", tmp_path / "empty.yaml", GIVEN, *SMALL, "--out", out)
    ran = pcs(*arguments)
    assert ran.code == 2 and "1 of 2 cells failed" in ran.err and "empty on development-duck" in ran.err
    assert (
        f"{GIVEN}, without the concept" in ran.out
        and "a generic object of the class" in ran.out
        and "Toy numbers" in ran.out
    )
    lines = {(r["recipe"], r["thing"]): r for r in csv.DictReader((out / "comparison.csv").open())}
    pooled = lines[GIVEN, ""]
    assert pooled["assets"] == "1" and lines["empty", "development-duck"]["error"] and not lines["empty", ""]["iou"]
    assert 0 < float(pooled["iou.sphere"]) < float(pooled["iou"]) < float(pooled["iou.truth"]) == 1
    assert float(pooled["iou.sphere"]) < float(pooled["iou.generic"]) < 1
    assert float(pooled["iou"]) == pytest.approx(float(pooled["iou.base"]), abs=1e-3), (
        "both assets have the mesh's shape"
    )
    assert (out / "meshes" / "duck.ply").is_file() and "were given the usual shape of the class" in ran.out
    assert pooled["iou.low"] == "" and float(pooled["training_seconds"]) > 0
    (kept,) = (out / "cells" / GIVEN).rglob("cell.json")
    report = json.loads(kept.read_text())["report"]
    assert report["made"]["prompt"] == report["base"]["prompt"] == "a photo of a duck"
    assert len(report["made"]["curves"][0]["asset"]) == 16
    assets = ("asset", "asset-without-concept")
    made, plain = (json.loads((kept.parent / "work" / a / "asset.json").read_text()) for a in assets)
    assert made["prompt"] == "a photo of a <development-duck>" and list(made["concepts"]) == ["development-duck"]
    assert plain["prompt"] == "a photo of a duck" and plain["concepts"] == {}
    page = (out / "index.html").read_text()
    for place in ("work/report/report.html", "work/asset/turntable.mp4", "work/asset/asset.glb"):
        assert f'href="cells/{GIVEN}/development-duck/{place}"' in page and (kept.parent / place).is_file()
    assert page.count("data:image/png") == 12 and page.count("<svg") > 4 and "failed" in page
    (concept,) = out.rglob("concept.json")
    learned, again = concept.stat().st_mtime_ns, pcs(*arguments)
    assert (
        again.code == 2
        and f"{GIVEN} development-duck kept" in again.err
        and "empty development-duck start" in again.err
    )
    assert again.out == ran.out and concept.stat().st_mtime_ns == learned
    refused = pcs(*arguments, "--set-learn", "train.batch_size=2")
    assert refused.code == 2 and "different prompts, seeds, settings, recipe or instruments" in refused.err


LEARNS = """
base: dreambooth3d
train: {batch_size: 1}
field: {resolution: 12}
export: {resolution: 16, faces: 100, picture: 32, frames: 8, texture: 64}
sampling: {steps: 2}
sources: {class_pictures: {num_images: 1, steps: 1}}
phases:
  partial: {train: {steps: 1}}
  first: {train: {steps: 1}}
  full: {train: {steps: 1}}
  views: {task: {num: 1}}
  final: {train: {steps: 1}}
  second: {train: {steps: 1}}
"""


def test_a_recipe_that_learns_the_subject_itself_has_no_asset_without_the_concept(pcs, tmp_path: Path):
    (tmp_path / "learns.yaml").write_text(LEARNS)
    out = tmp_path / "table"
    ran = pcs("3d", "benchmark", tmp_path / "learns.yaml", "--subjects", "1", "--out", out)
    assert ran.code == 0, ran.err
    assert "learns, without the concept" not in ran.out and "learning the subject. This applies to learns." in ran.out
    (pooled, _) = csv.DictReader((out / "comparison.csv").open())
    assert float(pooled["iou"]) > 0 and pooled["iou.base"] == "" and pooled["iou.generic"]
    (kept,) = out.rglob("cell.json")
    report = json.loads(kept.read_text())["report"]
    assert report["base"] is None and report["made"]["prompt"] == "a photo of a duck"
    made = json.loads((kept.parent / "work" / "asset" / "asset.json").read_text())
    assert made["prompt"] == "a photo of a <development-duck>" and made["concepts"] == {}
    assert not list(out.rglob("concept.json")), "a concept that no recipe uses is not learned"
    page = (out / "index.html").read_text()
    assert "without the concept</a>" not in page and 'src=""' not in page
    again = pcs("3d", "benchmark", tmp_path / "learns.yaml", "--subjects", "1", "--out", out)
    assert "learns development-duck kept" in again.err and again.out == ran.out


def test_an_asset_is_made_again_only_if_it_would_differ(sd, tmp_path: Path):
    def how(*settings: str) -> Recipe3D:
        tiny = ("backbone=tiny", "prompt=a photo of a mug", "train.resolution=32", *SETTINGS, *settings)
        return load("hifa", tiny, "3d", Recipe3D)

    runner, out = Runner3D(sd), tmp_path / "asset"

    def made(recipe: Recipe3D, concept: dict[str, str]) -> int:
        make_once(runner, recipe, out, concept)
        return (out / "asset.json").stat().st_mtime_ns

    first = made(how(), {"adapter": "1"})
    assert made(how(), {"adapter": "1"}) == first
    second = made(how(), {"adapter": "2"})  # the concept has changed
    assert second != first and made(how("field.resolution=10"), {"adapter": "2"}) != second
    empty = how("train.steps=2", "export.threshold=1e6")
    with pytest.raises(ValueError, match="empty"):
        made(empty, {})
    third = (out / "asset.json").stat().st_mtime_ns
    assert made(how("field.resolution=10"), {"adapter": "2"}) == third, (
        "a failed run leaves the earlier asset as it was"
    )
    log = tmp_path / "asset.training" / "log.jsonl"
    before = log.read_text()
    with pytest.raises(ValueError, match="empty"):
        made(empty, {})
    assert log.read_text() == before, "finished steps are not repeated"


def test_invalid_options_are_reported_before_anything_runs(pcs, tmp_path: Path):
    for recipe, more, why in (
        ("hifa", ("--set", "trian.steps=3"), "trian"),
        ("hifa", ("--set-learn", "trian.steps=3"), "trian"),
        ("hifa", ("--learn", "t_loar"), "t_lora"),
        ("hifa", ("--split", "testing"), "testing"),
        (
            "hifa",
            ("--subjects", "development-duck,reporting-duck"),
            "unknown subject of the development split 'reporting-duck'",
        ),
        ("hifa", ("--subjects", "0"), "--subjects 0: give a number from 1 to 10,000, or names"),
        ("hifa", ("--prompt", "a photo of a duck"), "{concept}"),
        ("hfia", (), "hifa"),
        ("realfusion", (), "realfusion: references.azimuth_deg must have one azimuth per picture (5), but has 1"),
        ("texture_personalization", ("--set", "field.start.path=missing.glb"), "missing.glb"),
        ("texture_personalization", ("--set", "export=null"), "texture_personalization: export = null leaves no mesh"),
        ("sjc", (), "export"),
    ):
        ran = pcs("3d", "benchmark", recipe, *more, "--out", tmp_path / "t")
        assert ran.code == 2 and why in ran.err and not (tmp_path / "t").exists(), (recipe, more, ran.err)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"mine")
    ran = pcs("3d", "benchmark", "hifa", "--out", tmp_path / "photos")
    assert ran.code == 2 and "photos already exists and contains 1 file, but no benchmark" in ran.err
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["mine.jpg"]


# --- the table ------------------------------------------------------------------------------


def score(key: str, value: float, **beside: float) -> Score:
    return Score(key=key, title=key, value=value, unit="rate", **beside)


def report(identity: float, iou: float, truth: float = 0.9) -> AssetReport:
    shape = Geometry(12, 8, True, 1, 1.0, 1.0, 1.0)
    scores = [
        score("verified", identity * truth, truth=truth),
        score("identity_relative", identity),
        score("iou", iou, truth=1.0, base=0.4),
        score("view", 0.75),
    ]
    return AssetReport(name="a", file="asset.glb", scores=scores, geometry=shape, costs={"training_seconds": 10})


def cell(identity: float, iou: float, base: float = 0.1, generic: float = 0.5, truth: float = 0.9) -> AssetCell:
    return AssetCell(thing="x", made=report(identity, iou, truth), base=report(base, 0.3), generic={"iou": generic})


def test_every_subject_counts_equally_and_intervals_resample_subjects():
    row = aggregate_assets("r", {"a": cell(1.0, 0.8), "b": cell(0.5, 0.6)}, {"c": "no"})
    assert row.value("identity_relative") == 0.75 and row.scores["identity_relative"].base == pytest.approx(0.1)
    assert (row.scores["identity_relative"].low, row.scores["identity_relative"].high) == (0.5, 1.0)
    assert row.sphere["iou"] == 0.4 and row.generic["iou"] == 0.5 and row.scores["iou"].truth == 1
    assert row.training_seconds == 10 and row.failed == {"c": "no"}
    one = aggregate_assets("r", {"a": cell(1.0, 0.8)}, {})
    assert one.scores["iou"].low is None, "there is no interval for a single subject"


def test_means_of_yes_or_no_scores_are_shown_as_percentages():
    def closed(value: float) -> AssetCell:
        made = report(0.5, 0.5)
        return cell(0.5, 0.5).model_copy(
            update={"made": made.model_copy(update={"scores": [score("watertight", value)]})}
        )

    table = compare_assets({("r", "a"): closed(1.0), ("r", "b"): closed(0.0)}, {}, Path())
    assert "| 50% (0% to 100%) |" in table.markdown()


def test_a_subject_whose_true_renders_are_not_verified_is_shown_separately():
    cells = {("r", "a"): cell(0.5, 0.6), ("r", "dark"): cell(1.0, 0.9, truth=0.3)}
    table = compare_assets(cells, {}, Path())
    assert table.rows[0].value("identity_relative") == 0.5 and table.apart == {"dark": 0.3}
    assert "Shown apart" in table.markdown() and "dark (30%)" in table.markdown()
    assert [line.split(",")[1] for line in table.csv().splitlines()[1:]] == ["", "a", "dark"]


def test_a_goal_requires_high_scores_that_also_beat_the_baselines():
    goal = AssetGoal(identity=0.5, view=0.65, iou=0.55)
    for made, met in (
        (cell(0.6, 0.7), True),
        (cell(0.4, 0.7), False),  # the identity is too low
        (cell(0.6, 0.5), False),  # the overlap of the silhouettes is too low
        (cell(0.6, 0.7, base=0.6), False),  # no better than without the concept
        (cell(0.6, 0.7, generic=0.8), False),  # no better than a generic object of the class
    ):
        assert goal.met(aggregate_assets("r", {"a": made}, {})) is met
    alone = cell(0.6, 0.7).model_copy(update={"base": None})
    assert goal.met(aggregate_assets("r", {"a": alone}, {})) is True, (
        "there is no asset without the concept to compare with"
    )
    given = cell(0.6, 0.7, generic=0.8).model_copy(update={"shape_given": True})
    assert goal.met(aggregate_assets("r", {"a": given}, {})) is True, "a given shape need not beat itself"
    assert "given the usual shape of the class" in compare_assets({("r", "a"): given}, {}, Path(), goal).notes[-1]
    assert AssetGoal().met(aggregate_assets("r", {"a": cell(0.6, 0.7)}, {})) is None
    assert goal.met(aggregate_assets("r", {}, {"a": "no"})) is False


def test_the_best_identity_comes_first_and_mixed_instruments_are_refused():
    cells = {("bad", "a"): cell(0.2, 0.9), ("good", "a"): cell(0.6, 0.5), ("better", "a"): cell(0.6, 0.7)}
    table = compare_assets(cells, {("bad", "b"): "RuntimeError: <no>"}, Path(), AssetGoal(identity=0.5))
    assert [r.recipe for r in table.rows] == ["better", "good", "bad"]
    assert [table.met(r) for r in table.rows] == ["yes", "yes", "no"]
    assert "1, 1 failed" in table.markdown() and "RuntimeError: <no>" in table.csv()
    assert "RuntimeError: &lt;no&gt;" in table.html()
    other = cell(0.2, 0.9).model_copy(deep=True)
    other.made.instruments.append(Instrument(name="another", measures="x"))
    with pytest.raises(ValueError, match="different instruments"):
        compare_assets({**cells, ("bad", "b"): other}, {}, Path())


def test_curves_are_averaged_over_subjects():
    def with_curve(values: list[float | None]) -> AssetCell:
        curve = Curve(key="iou", title="Overlap", azimuth_deg=[0.0, 180.0], asset=values, truth=[1.0, 1.0])
        made = report(0.5, 0.5).model_copy(update={"curves": [curve]})
        return cell(0.5, 0.5).model_copy(update={"made": made})

    one, two = with_curve([0.2, 0.4]), with_curve([0.6, None])
    mean = compare_assets({("r", "m"): with_curve([0.4, 0.4])}, {}, Path()).html()
    both = compare_assets({("r", "a"): one, ("r", "b"): two}, {}, Path()).html()
    svg = [page[page.index("<svg") : page.index("</svg>")] for page in (mean, both)]
    assert svg[0] == svg[1] and "Overlap by azimuth" in svg[0]
