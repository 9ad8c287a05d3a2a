"""The benchmarks run on folders with tiny models and print every expected line. The measured values are not tested."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.video.clip_models import build_animatediff

SCRIPT = Path(__file__).with_name("bench_step.py")


def test_the_picture_benchmark_prints_the_split_of_a_step_and_both_speeds(make_tiny_sd, tmp_path):
    folder = tmp_path / "tiny-sd"
    make_tiny_sd().save_pretrained(folder)
    command = [sys.executable, SCRIPT, "--steps", "4", "--backbone", folder]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name in ("data", "autoencoder", "text encoder", "denoiser", "backward", "optimizer"):
        assert f"  {name} " in ran.stdout
    for label in ("split of a step", "a plain loop without caches: "):
        assert label in ran.stdout


def test_the_clip_benchmark_prints_the_split_of_a_step_and_the_speed_and_peak_memory_of_both_loops(
    make_tiny_sd, tmp_path
):
    folder = tmp_path / "tiny-animatediff"
    build_animatediff(make_tiny_sd()).save_pretrained(folder)
    command = [sys.executable, SCRIPT.with_name("bench_clip_step.py"), "--steps", "1", "--backbone", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, "--frames", "4"], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name in ("data", "autoencoder", "text encoder", "denoiser", "backward", "optimizer"):
        assert f"  {name} " in ran.stdout
    for label in ("split of a step", "a plain loop without caches: ", "peak memory: ", "without caches"):
        assert label in ran.stdout


def test_the_asset_benchmark_prints_the_split_of_an_iteration_and_the_views_per_second(make_tiny_sd, tmp_path):
    folder = tmp_path / "tiny-sd"
    make_tiny_sd().save_pretrained(folder)
    command = [sys.executable, SCRIPT.with_name("bench_asset_step.py"), "--steps", "1", "--backbone", folder]
    command += ["--side", "16", "--set", "guidance.resolution=32", "--set", "field.resolution=8"]
    ran = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name in ("render", "encode", "teacher", "backward", "optimizer", "rest"):
        assert f"  {name} " in ran.stdout
    assert "rendered views per second of optimisation: " in ran.stdout


def test_the_comparison_with_a_plain_loop_prints_both_ratios(make_tiny_sd, tmp_path):
    folder = tmp_path / "tiny-sd"
    make_tiny_sd().save_pretrained(folder)
    command = [sys.executable, SCRIPT.with_name("bench_script.py"), "--steps", "1", "--rounds", "1", "--roles", "all"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, "--backbone", folder], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for label in ("  plain ", "  suite ", "steps per CPU second: ", "peak memory: "):
        assert label in ran.stdout
