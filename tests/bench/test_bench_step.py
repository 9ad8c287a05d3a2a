"""The benchmarks run on folders with tiny models and print every expected line. The measured values are not tested."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.video.clip_models import build_animatediff

HERE = Path(__file__).parent


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Returns a function that runs a benchmark script in this process, and returns what the script prints."""

    def run(script: str, *arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", [script, *(str(a) for a in arguments)])
        monkeypatch.syspath_prepend(HERE)  # the scripts import each other
        capsys.readouterr()
        runpy.run_path(str(HERE / script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def tiny(make_tiny_sd, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny-sd"
    make_tiny_sd().save_pretrained(folder)
    return folder


def test_the_picture_benchmark_prints_the_split_of_a_step_and_both_speeds(printed, tiny):
    shown = printed("bench_step.py", "--steps", 4, "--backbone", tiny)
    for name in ("data", "autoencoder", "text encoder", "denoiser", "backward", "optimizer"):
        assert f"  {name} " in shown
    for label in ("breakdown of a step", "a plain loop without caches: "):
        assert label in shown


def test_the_clip_benchmark_prints_the_split_of_a_step_and_the_speed_and_peak_memory_of_both_loops(
    printed, make_tiny_sd, tmp_path
):
    folder = tmp_path / "tiny-animatediff"
    build_animatediff(make_tiny_sd()).save_pretrained(folder)
    shown = printed("bench_clip_step.py", "--steps", 1, "--backbone", folder, "--frames", 4)
    for name in ("data", "autoencoder", "text encoder", "denoiser", "backward", "optimizer"):
        assert f"  {name} " in shown
    for label in ("breakdown of a step", "a plain loop without caches: ", "peak memory: ", "without caches"):
        assert label in shown


def test_the_asset_benchmark_prints_the_split_of_an_iteration_and_the_views_per_second(printed, tiny):
    small = ("--side", 16, "--set", "guidance.resolution=32", "--set", "field.resolution=8")
    shown = printed("bench_asset_step.py", "--steps", 1, "--backbone", tiny, *small)
    for name in ("render", "encode", "teacher", "backward", "optimizer", "rest"):
        assert f"  {name} " in shown
    assert "rendered views per second of optimization: " in shown


def test_the_full_size_asset_benchmark_measures_every_case_and_names_what_replaces_cuda_kernels(printed, tmp_path):
    out = tmp_path / "rows.json"
    shown = printed("bench_full_size_3d.py", "--tiny", "--device", "cpu", "--seconds", 0, "--out", out)
    rows = json.loads(out.read_text())["rows"]
    assert [(r["model"], r["field"]) for r in rows] == [
        ("SD, tiny", "voxels"), ("SD, tiny", "gaussians"), ("FLUX, tiny", "voxels")
    ]  # fmt: skip
    for row in rows:
        assert not row["error"] and row["iterations_per_second"] > 0 and min(row["milliseconds"].values()) > 0
        assert row["milliseconds"].keys() == {"render", "encode", "teacher", "backward", "optimizer", "rest"}
    assert "Gaussians are rendered in PyTorch" in shown and "nerfacc 0.5" in shown


def test_the_full_size_benchmark_measures_every_model_with_and_without_checkpointing(printed, tmp_path):
    printed("bench_full_size.py", "--tiny", "--device", "cpu", "--seconds", 0, "--out", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["error"] for row in rows] == [""] * 4 and all(row["trained"] and row["seconds"] for row in rows)
    assert {(row["model"].split(",")[0], row["checkpointing"]) for row in rows} == {
        (model, on) for model in ("AnimateDiff", "Wan 2.1") for on in (True, False)
    }
    printed("bench_full_size.py", "--tiny", "--device", "meta", "--out", tmp_path / "stored.json")
    stored = [row["stored_gib"] for row in json.loads((tmp_path / "stored.json").read_text())["rows"]]
    assert 0 < stored[0] < 0.5 * stored[1] and 0 < stored[2] < 0.5 * stored[3], "checkpointing stores less"


def test_the_comparison_with_a_plain_loop_prints_both_ratios(printed, tiny):
    shown = printed("bench_script.py", "--steps", 1, "--rounds", 1, "--roles", "all", "--backbone", tiny)
    for label in ("  plain ", "  suite ", "steps per CPU second: ", "peak memory: "):
        assert label in shown
