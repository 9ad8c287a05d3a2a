"""Tests the cells, tables and resumed runs of `pcs video benchmark` on the toybox, with an untrained motion module."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from shared.benchmark.clip_table import ClipGoal, aggregate_clips, compare_clips
from shared.benchmark.toybox_clips import ClipBenchmarkSettings, cells_of
from shared.io.decode import read_picture
from shared.metrics.clips.report import ClipReport, ClipRow
from shared.metrics.report import Score
from shared.toybox.motions.clips import draw_clip
from shared.toybox.motions.reference_clips import reference_moving
from shared.toybox.reference_sets import held_out

pytestmark = pytest.mark.usefixtures("few_true_pictures")

SMALL = (
    "--motions", "1", "--subjects", "1", "--limit", "1", "--num", "1", "--steps", "1",
    "--set", "train.steps=1", "--set", "preview.num=0", "--set", "sampling.frames=4",
    "--subject-recipe", "textual_inversion",
    "--set-subject", "train.steps=1", "--set-subject", "preview.num=0", "--set-subject", "train.validation.every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from shared.pretrain.toybox.evaluate_backbone import open_pipeline
    from shared.pretrain.toybox.motion_module import build_adapter

    folder = tmp_path_factory.mktemp("motion_adapter")
    build_adapter(open_pipeline(None).unet).save_pretrained(folder)
    return folder


def test_motion_recipes_are_compared_and_a_second_call_keeps_finished_cells(pcs, tmp_path: Path, adapter: Path):
    arguments = ("video", "benchmark", "motion_director", *SMALL, "--motion-adapter", adapter, "--out", tmp_path / "t")
    ran = pcs(*arguments)
    assert ran.code == 0, ran.err
    assert "motion_director" in ran.out and "base model" in ran.out and "Toy numbers" in ran.out
    (pooled, cell) = csv.DictReader((tmp_path / "t" / "comparison.csv").open())
    assert pooled["clips"] == cell["clips"] == "1" and " with " in cell["cell"]
    assert 0 <= float(pooled["motion_recognised"]) <= 1 and 0 <= float(pooled["identity"]) <= 1
    page = (tmp_path / "t" / "index.html").read_text()
    (report,) = (tmp_path / "t").rglob("report/index.html")
    assert f'href="{report.relative_to(tmp_path / "t").as_posix()}"' in page
    assert {p.parent.parent.name for p in (tmp_path / "t").rglob("concept.json")} == {"subjects", "motion_director"}
    again = pcs(*arguments)
    assert again.code == 0 and "kept" in again.err and "start" not in again.err and again.out == ran.out
    concepts = {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("concept.json")}
    (kept,) = (tmp_path / "t").rglob("cell.json")
    before = json.loads(kept.read_text())["report"]["scores"]
    kept.unlink()
    scored = pcs(*arguments)
    assert scored.code == 0 and {p: p.stat().st_mtime_ns for p in (tmp_path / "t").rglob("concept.json")} == concepts
    assert json.loads(kept.read_text())["report"]["scores"] == before
    other = pcs(*arguments, "--set", "train.batch_size=2")
    assert other.code == 2 and "different prompts, seeds, settings, recipe or instruments" in other.err


def test_a_subject_can_be_learned_with_a_video_recipe(pcs, tmp_path: Path, adapter: Path):
    less = ["--set-subject", "sources.class_pictures=null", "--set-subject", "regularize.prior=null"]
    asked = [*SMALL, "--subject-recipe", "subject_lora", *less, "--motion-adapter", adapter, "--out", tmp_path / "t"]
    ran = pcs("video", "benchmark", "motion_inversion", *asked)
    assert ran.code == 0, ran.err
    (concept,) = (tmp_path / "t" / "subjects").glob("*/concept.json")
    meta = json.loads(concept.read_text())
    assert meta["recipe"]["method"] == "subject_lora" and meta["backbone"]["family"] == "animatediff"
    lines = ran.out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:6]] == [
        "| motion_inversion", "| base model", "| true clips or pictures", "| a guess"
    ]  # fmt: skip
    assert lines[5].split(" | ")[3] == "8%" and "%" in lines[4]  # a guess among 13 candidates


def test_a_recipe_that_learns_a_subject_with_its_motion_is_given_clips_of_both(pcs, tmp_path: Path, adapter: Path):
    one_step = [
        f"--set=phases.{p}.{k}" for p in ("set", "sequence") for k in ("train.steps=1", "sources.clips.window.length=8")
    ]
    asked = (*SMALL, *one_step, "--motion-adapter", adapter, "--out", tmp_path / "t")
    ran = pcs("video", "benchmark", "set_then_sequence", *asked)
    assert ran.code == 0, ran.err
    clips = tmp_path / "t" / "references" / "development-zigzag with development-duck"
    truth = reference_moving("development-zigzag", 4, 0, thing=held_out("development-duck").thing)
    assert len({m.scene.background for m in truth}) == 4 and len({m.scene.things for m in truth}) == 1
    frame = read_picture(clips / "03" / "000.png").pixels / 2 + 0.5
    assert (frame.permute(1, 2, 0) - draw_clip(truth[3]).frames[0]).abs().max() < 0.01
    assert (clips / "03" / "caption.txt").read_text().startswith("a photo of a duck ")
    (concept,) = (tmp_path / "t").rglob("concept.json")
    meta = json.loads(concept.read_text())
    assert (meta["class_noun"], len(meta["references"])) == ("duck", 4)
    (cell,) = (tmp_path / "t").rglob("cell.json")
    report = json.loads(cell.read_text())["report"]
    assert report["prompts"] == ["a photo of a <development-zigzag> on the beach"]
    scores = {score["key"] for score in report["scores"]}
    assert {"motion_recognised", "identity", "both"} <= scores and not {"leakage", "false_motion"} & scores
    assert "leakage from its clips is not measured" in " ".join(report["notes"])


def test_invalid_options_are_reported_before_anything_runs(pcs, tmp_path: Path):
    for more, why in (
        (("--set", "trian.steps=3"), "trian"),
        (("--set-subject", "trian.steps=3"), "trian"),
        (("--split", "testing"), "testing"),
        (("--subject-recipe", "dreambooth_loar"), "dreambooth_lora"),
        (("--subject-recipe", "subject_lora", "--set-subject", "trian.steps=3"), "trian"),
        (("--subject-recipe", "motion_inversion"), "--subject-recipe motion_inversion learns a motion, not a subject"),
        (("--subject-recipe", "set_then_sequence"), "set_then_sequence learns a subject together with its motion"),
        (("subject_lora",), "subject_lora learns a subject from pictures, not a motion: give it as --subject-recipe"),
        (("set_then_sequence", "--subjects", "0"), "--subjects 0: set_then_sequence learns a subject together with"),
    ):
        ran = pcs("video", "benchmark", "motion_director", *more, "--out", tmp_path / "t")
        assert ran.code == 2 and why in ran.err and not (tmp_path / "t").exists(), more
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"mine")
    ran = pcs("video", "benchmark", "motion_director", "--out", tmp_path / "photos")
    assert ran.code == 2 and "photos already exists and contains 1 file, but no benchmark" in ran.err
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["mine.jpg"]


def test_a_cell_is_a_motion_with_or_without_a_subject():
    of_four = cells_of(ClipBenchmarkSettings(motions=2, subjects=2))
    assert of_four["zigzag with duck"] == ("development-zigzag", "development-duck") and len(of_four) == 4
    assert cells_of(ClipBenchmarkSettings("reporting", motions=1, subjects=0)) == {
        "staircase": ("reporting-staircase", "")
    }
    named = ClipBenchmarkSettings(motions=("development-spiral",), subjects=("development-mug", "development-cat"))
    assert list(cells_of(named)) == ["spiral with mug", "spiral with cat"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--motions", "development-slide"), "unknown motion of the development split 'development-slide'"),
        (("--subjects", "development-duck,mug"), "unknown subject of the development split 'mug'"),
        (("--motions", "0"), "--motions 0: give a number from 1 to 10,000, or names"),
        (("--subjects", "-1"), "--subjects -1: give a number from 0 to 10,000, or names"),
    ],
)
def test_unknown_names_and_invalid_counts_are_refused_before_anything_is_learned(pcs, tmp_path, options, message):
    ran = pcs("video", "benchmark", "motion_director", *options, "--out", tmp_path / "t")
    assert ran.code == 2 and message in ran.err and not (tmp_path / "t").exists()


def report(motion: str, hits: tuple[int, ...], identity: tuple[float, ...], truth: float = 0.5) -> ClipReport:
    """Returns a report on clips with the given scores and on the same number of base-model clips, which all score 0."""
    rows = [
        ClipRow(
            kind=kind, prompt=0, text="", seed=i, file=f"{i}.webp",
            scores={"motion_recognised": h * on, "identity": p * on, "both": h * p * on, "ceiling": truth},
        )
        for kind, on in (("concept", 1), ("base", 0))
        for i, (h, p) in enumerate(zip(hits, identity, strict=True))
    ]  # fmt: skip
    scores = [Score(key="identity", title="", value=1.0, explanation="", truth=truth)]
    return ClipReport(motion=motion, subject="dog", clips=rows, scores=scores)


def test_clips_of_all_cells_are_pooled_and_identity_stays_relative_to_true_pictures():
    reports = {"a": report("a", (1, 1), (0.5, 0.25)), "b": report("b", (0, 1), (0.2, 0.2), truth=0.8)}
    row = aggregate_clips("x", reports, {})
    assert (row.motions, row.clips) == (("a", "b"), 4)
    assert row.value("motion_recognised") == 0.75 and row.scores["motion_recognised"].base == 0
    assert row.value("identity") == pytest.approx((1.0 + 0.5 + 0.25 + 0.25) / 4)
    assert row.value("both") == pytest.approx((1.0 + 0.5 + 0 + 0.25) / 4)
    # In these reports, the subject is verified more often in the clips than in true pictures.
    easy = {name: report(name, (1, 0), (0.9, 0.9)) for name in ("c", "d")}
    easy_row = aggregate_clips("x", easy, {})
    identity = easy_row.scores["identity"]
    assert (identity.low, identity.value, identity.high) == (1.0, 1.0, 1.0)
    assert easy_row.value("both") == easy_row.value("motion_recognised") == 0.5
    # The intervals come from resampled motions. Here, a resample contains motion a twice, motion b twice, or each once.
    assert (row.scores["motion_recognised"].low, row.scores["motion_recognised"].high) == (0.5, 1.0)


def leaks(value: float) -> dict[str, Score]:
    return {"leakage": Score(key="leakage", title="", value=value, explanation="")}


def test_a_goal_requires_every_score_and_the_best_product_comes_first():
    reports = {("good", "a"): report("a", (1, 1), (0.5, 0.5)), ("bad", "a"): report("a", (0, 1), (0.1, 0.1))}
    table = compare_clips(reports, {("bad", "b"): "RuntimeError: no"}, ClipGoal(0.6, 0.6, 0.3, 0.45))
    assert [r.recipe for r in table.rows] == ["good", "bad"] and [table.met(r) for r in table.rows] == ["yes", "no"]
    assert table.rows[0].scores["identity"].low is None, "a single motion gives no confidence interval"
    assert ClipGoal().met(table.rows[0]) is None and ClipGoal(both=1.01).met(table.rows[0]) is False
    leaky = replace(table.rows[0], recipe="plain", scores=leaks(0.7))
    least = replace(table.rows[0], scores={**table.rows[0].scores, **leaks(0.6)})
    goal = ClipGoal(both=0.1, leaks_less_than="plain")
    assert goal.met(least, [least, leaky]) and goal.met(least) and not goal.met(table.rows[0], [table.rows[0], leaky])
    assert goal.met(replace(least, scores={**least.scores, **leaks(0.8)}), [least, leaky]) is False
    assert "1, 1 failed" in table.markdown() and "RuntimeError: no" in table.csv()
