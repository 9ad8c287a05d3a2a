"""`pcs image benchmark` on the shipped toybox with very little training, including resumed and failed runs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable

import pytest

from shared.toybox.weights import backbone_path
from tests.image.refusing import refusing

pytestmark = pytest.mark.usefixtures("few_true_pictures")

SMALL = (
    "--subjects", "1", "--limit", "1", "--num", "1", "--set", "train.steps=2", "--set", "sampling.steps=1",
    "--set", "train.validation.every=0", "--set", "preview.num=0",
)  # fmt: skip


@pytest.fixture
def refused(pcs, tmp_path) -> Callable[..., str]:
    return refusing(pcs, tmp_path)


def test_recipes_are_compared_and_a_second_call_keeps_finished_cells(pcs, tmp_path):
    arguments = ["image", "benchmark", "textual_inversion", *SMALL, "--out", tmp_path / "table"]
    ran = pcs(*arguments)
    assert ran.code == 0, ran.err
    assert "textual_inversion" in ran.out and "Toy numbers" in ran.out
    assert {"comparison.csv", "comparison.md", "index.html"} <= {p.name for p in (tmp_path / "table").iterdir()}
    (pooled, cell) = csv.DictReader((tmp_path / "table" / "comparison.csv").open())
    assert (pooled["recipe"], pooled["pictures"], cell["subject"]) == ("textual_inversion", "1", cell["subject"])
    assert 0 <= float(pooled["identity"]) <= 1 and float(pooled["training_seconds"]) > 0
    (kept,) = (tmp_path / "table").rglob("cell.json")
    assert json.loads(kept.read_text())["inputs"]["recipe"]["train"]["steps"] == 2
    again = pcs(*arguments)
    assert again.code == 0 and "kept" in again.err and "start" not in again.err
    assert again.out == ran.out
    (learned,) = (tmp_path / "table").rglob("concept.json")
    before, cell = learned.stat().st_mtime_ns, json.loads(kept.read_text())
    kept.unlink()
    scored = pcs(*arguments)
    assert scored.code == 0 and "start" in scored.err and learned.stat().st_mtime_ns == before
    assert json.loads(kept.read_text())["report"]["scores"] == cell["report"]["scores"]
    other = pcs(*arguments, "--set", "trainable.tokens.lr=0.5")
    assert other.code == 2 and "different prompts, seeds, settings, recipe or instruments" in other.err


def test_a_failed_run_is_named_and_makes_the_command_fail(pcs, tmp_path):
    hot = ("--set", "trainable.tokens.lr=1e30", "--set", "train.steps=6")
    ran = pcs("image", "benchmark", "textual_inversion", *SMALL, *hot, "--out", tmp_path / "table")
    assert ran.code == 2 and "Traceback" not in ran.err
    assert "1 of 1 cells failed" in ran.err and "textual_inversion on" in ran.err


def test_an_unknown_setting_is_reported_before_anything_runs(pcs, tmp_path):
    ran = pcs("image", "benchmark", "textual_inversion", *SMALL, "--set", "trian.steps=3", "--out", tmp_path / "table")
    assert ran.code != 0 and "trian" in ran.err and not (tmp_path / "table").exists()


def test_user_recipes_can_be_compared_with_shipped_recipes(pcs, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: textual_inversion\n")
    recipes = ("textual_inversion", tmp_path / "mine.yaml")
    grid = ("--grid", "trainable.tokens.lr=0.5", "--control", "mine trainable.tokens.lr=0.5")
    ran = pcs("image", "benchmark", *recipes, *SMALL, *grid, "--out", tmp_path / "table")
    assert ran.code == 0, ran.err
    assert "ahead of mine" in ran.out
    rows = list(csv.DictReader((tmp_path / "table" / "comparison.csv").open()))
    assert {r["recipe"] for r in rows} == {f"{r} trainable.tokens.lr=0.5" for r in ("textual_inversion", "mine")}
    (kept,) = (tmp_path / "table/cells/mine_trainable.tokens.lr_0.5").rglob("cell.json")
    assert json.loads(kept.read_text())["inputs"]["recipe"]["trainable"]["tokens"]["lr"] == 0.5


def test_two_recipes_with_the_same_name_are_refused(pcs, tmp_path):
    (tmp_path / "textual_inversion.yaml").write_text("base: pivotal_tuning\n")
    recipes = ("textual_inversion", tmp_path / "textual_inversion.yaml")
    ran = pcs("image", "benchmark", *recipes, *SMALL, "--out", tmp_path / "table")
    assert ran.code == 2 and "would both be called 'textual_inversion' in the table" in ran.err
    gone = pcs("image", "benchmark", tmp_path / "gone.yaml", *SMALL, "--out", tmp_path / "table")
    assert gone.code == 2 and "gone.yaml does not exist" in gone.err and not (tmp_path / "table").exists()


def test_an_unknown_control_or_subject_is_refused(pcs, tmp_path):
    for wrong, named in ((("--control", "t_lroa"), "t_lora"), (("--subjects", "development-mgu"), "development-mug")):
        ran = pcs("image", "benchmark", "t_lora", *wrong, "--out", tmp_path / "table")
        assert ran.code == 2 and named in ran.err and not (tmp_path / "table").exists()


def test_an_output_folder_without_a_benchmark_is_refused_before_a_model_is_loaded(
    refused, painted, tmp_path, monkeypatch
):
    monkeypatch.setattr("shared.benchmark.toybox.load_backbone", lambda *_, **__: pytest.fail("a model was loaded"))
    photos, recipe = painted(tmp_path / "photos"), tmp_path / "own" / "mine.yaml"
    recipe.parent.mkdir()
    recipe.write_text("base: textual_inversion\n")
    (tmp_path / "gone").symlink_to(tmp_path / "unplugged")
    (tmp_path / "file").write_text("mine")
    for out, why in (
        (photos, f"{photos} already exists and contains 3 files, but no benchmark: choose another output"),
        (tmp_path / "gone", f"leads nowhere: {tmp_path / 'gone'} is a link to {tmp_path / 'unplugged'}"),
        (tmp_path / "file", "is an existing file"),
        (recipe.parent, f"contains {recipe}, which is an input"),
        (backbone_path() / "table", f"lies inside {backbone_path()}, which is an input"),
    ):
        assert why in refused("image", "benchmark", recipe, *SMALL, "--out", out), out
