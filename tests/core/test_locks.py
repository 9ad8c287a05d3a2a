"""Only one process at a time can write to an output."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from shared.benchmark.experiment import Experiment, benchmark
from shared.cli import build, run
from shared.evaluation.clips.evaluate import ClipShots, evaluate_clips
from shared.evaluation.evaluate import Shots, evaluate
from shared.io.locks import holding
from shared.io.outputs import atomic_folder, check_file, check_output
from shared.pretrain.evaluators.calibrate import calibrate
from shared.pretrain.evaluators.model_card import write_card
from shared.pretrain.evaluators.training_curve import extend
from shared.recipe.resolve import load
from shared.runner.learn import personalize
from shared.runner.plan import plan
from shared.toybox.reference_sets import write_album
from shared.toybox.weights import WEIGHTS
from shared.train import checkpoint

HOLDS = """
import sys, time
from pathlib import Path
from shared.io.locks import hold, holding
with holding():
    hold(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(100)
"""


@contextmanager
def locked_elsewhere(path: Path) -> Iterator[str]:
    """Keeps a lock on `path` in another process. Yields a pattern that matches the error of a command that is refused."""
    process = subprocess.Popen([sys.executable, "-c", HOLDS, path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield f"{path} is being written by process {process.pid}"
    finally:
        process.kill()
        process.wait()


def test_an_output_stays_locked_until_its_command_ends_or_is_killed(tmp_path: Path) -> None:
    out, link = tmp_path / "x.concept", tmp_path / "link"
    out.mkdir()
    link.symlink_to(out)
    process = subprocess.Popen([sys.executable, "-c", HOLDS, out], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    for path in (out, link):
        with holding(), pytest.raises(ValueError, match=rf"{path} is being written by process {process.pid} \(started"):
            check_output(path, overwrite=True)
    nothing: Any = Experiment({"a": 1}, ["mug"], "a photo of a mug", range(1)), out, None
    with holding(), pytest.raises(ValueError, match=f"is being written by process {process.pid}"):
        benchmark(lambda *_: None, *nothing)
    check_output(tmp_path / "y.concept")
    process.kill()
    process.wait()
    with holding():
        assert check_output(out) == check_output(out) == out, (
            "the output is free again, and this command may lock it twice"
        )
        check_file(tmp_path / "a.png")
        second = subprocess.run([sys.executable, "-c", HOLDS, out], capture_output=True, text=True)
        assert second.returncode == 1 and "is being written by process" in second.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x.concept"], (
        "no lock file is left next to the output"
    )


def test_the_lock_is_visible_to_other_users_and_covers_nested_paths(capsys, tmp_path: Path) -> None:
    out = tmp_path / "run5" / "d.concept"
    elsewhere = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": "/proc/none", "PCS_CACHE": "/proc/none"}
    elsewhere["TMPDIR"] = str(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLDS, out], stdout=subprocess.PIPE, text=True, env=elsewhere)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with holding():
            for path in (out, out / "preview.png", tmp_path / "run5"):
                with pytest.raises(ValueError, match=f"{path} is being written by process {process.pid}"):
                    check_output(path)
            assert run(build(), ["toybox", "train", "vae", "--work", str(out)]) == 2
            assert f"{out} is being written by process {process.pid}" in capsys.readouterr().err
            check_output(tmp_path / "run5" / "e.concept")
            check_output(tmp_path / "run55")
    finally:
        process.kill()
        process.wait()
    with holding():
        check_output(tmp_path / "run5")
        check_output(out)


def test_an_output_that_cannot_be_locked_causes_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shared.io.locks._TEMPORARY", Path("/proc/none"))
    with (
        holding(),
        pytest.warns(UserWarning, match=rf"{tmp_path / 'x'} cannot be locked \(.*\): make sure that no other"),
    ):
        check_output(tmp_path / "x")


def test_every_command_locks_its_output(tmp_path: Path) -> None:
    out, asked = tmp_path / "x", ("image", "generate", "a mug", "--backbone", tmp_path / "none", "--out")
    with locked_elsewhere(out) as message:
        done = subprocess.run([sys.executable, "-m", "shared.cli", *asked, out], capture_output=True, text=True)
        assert done.returncode == 2 and message in done.stderr


def test_functions_that_are_called_from_python_lock_their_outputs(tmp_path: Path) -> None:
    write_album("development-duck", tmp_path / "photos")
    out, unused = tmp_path / "x.concept", cast(Any, None)
    settings = [f"subject.images={tmp_path / 'photos'}", "subject.class_noun=duck", f"output={out}"]
    planned = plan(load("textual_inversion", settings))
    for place in (out, tmp_path / "x.training"):
        with locked_elsewhere(place) as message, pytest.raises(ValueError, match=message):
            personalize(planned, unused)
    with locked_elsewhere(out) as message:
        for call in (
            lambda: evaluate(unused, unused, unused, unused, unused, Shots((0,), out=out)),
            lambda: evaluate_clips(unused, unused, unused, unused, ClipShots((0,), out=out)),
            lambda: benchmark(unused, Experiment({"a": 1}, ["mug"], "a photo of a mug", range(1)), out, unused),
            lambda: atomic_folder(out).__enter__(),
        ):
            with pytest.raises(ValueError, match=message):
                call()


def test_a_resumed_run_also_locks_its_training_folder(tmp_path: Path) -> None:
    """The outputs `x` and `x.concept` have the same training folder."""
    write_album("development-duck", tmp_path / "photos")
    checkpoint.save(tmp_path / "x.training", checkpoint.State(0, 1))
    settings = [f"subject.images={tmp_path / 'photos'}", "subject.class_noun=duck", f"output={tmp_path / 'x'}"]
    recipe = load("textual_inversion", settings)
    with locked_elsewhere(tmp_path / "x.training") as message, holding(), pytest.raises(ValueError, match=message):
        plan(recipe, resume=True)
    plan(recipe, resume=True)


def test_commands_that_write_shipped_weights_lock_them_first(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with locked_elsewhere(WEIGHTS / "CARD.md") as message:
        assert run(build(), ["toybox", "evaluate", "--card", "--backbone", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
    with locked_elsewhere(WEIGHTS / "pose") as message:
        assert run(build(), ["toybox", "train", "pose", "--work", str(tmp_path / "work")]) == 2
        assert message in capsys.readouterr().err
    for file, start in (
        (tmp_path / "calibration.json", lambda: next(calibrate(2, out=tmp_path / "calibration.json"))),
        (tmp_path / "curve.json", lambda: next(extend(tmp_path, 8, 4.0, weights=tmp_path))),
        (tmp_path / "card.json", lambda: write_card(8, weights=tmp_path)),
    ):
        with locked_elsewhere(file) as message, holding(), pytest.raises(ValueError, match=message):
            start()
    assert not list(tmp_path.iterdir())
