"""Training runs in real processes that are killed or stopped, and then resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from shared.cli import build, run

STEPS = ("phases.pivot.train.steps=2", "phases.tune.train.steps=20", "train.checkpoint_every=1", "train.batch_size=1")


@pytest.fixture(autouse=True)
def sighup_is_not_ignored():
    """Restores SIGHUP's default action. Under nohup, tests and the processes they start would otherwise ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def started(arguments: list[str], tmp_path: Path, before: Sequence[str] = (), **how) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.DEVNULL, "stderr": (tmp_path / "stderr").open("w"), **how}
    command = [*before, sys.executable, "-m", "shared.cli", *arguments]
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2], **streams)


IMPORTS = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "{library}":
            os.kill(os.getpid(), {number})
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.modules.pop("{library}", None)
sys.meta_path.insert(0, Finder())
import shared.cli
shared.cli.main(sys.argv[1:])
"""


def wait_for(what, process: subprocess.Popen, tmp_path: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "stderr").read_text()
        time.sleep(0.02)


def in_second_phase(training: Path):
    return lambda: any(p.name >= "checkpoint-01-0000003" for p in training.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(learn, tmp_path_factory) -> Path:
    """Returns the concept that the same run learns if it is not interrupted."""
    concept = tmp_path_factory.mktemp("whole") / "mug.concept"
    assert run(build(), learn("pivotal_tuning", *STEPS, f"output={concept}")) == 0
    return concept


def tensors(concept: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in concept.glob("*.safetensors")}


def test_a_run_killed_during_training_gives_the_same_tensors_when_resumed(pcs, learn, whole, tmp_path):
    concept, training = tmp_path / "cut" / "mug.concept", tmp_path / "cut" / "mug.training"
    arguments = learn("pivotal_tuning", *STEPS, f"output={concept}")
    process = started(arguments, tmp_path)
    try:
        wait_for(in_second_phase(training), process, tmp_path)
    finally:
        process.kill()  # sends SIGKILL, after which the program runs no more code
    assert process.wait() == -signal.SIGKILL and not concept.exists()
    left = sorted(p.name for p in training.iterdir())
    refused = pcs(*arguments)
    assert refused.code == 2 and "holds an interrupted run: continue it with --resume" in refused.err
    other = pcs(*arguments, "train.optimizers.main.eps=1e-6", "--resume")
    assert (
        other.code == 2
        and "the interrupted run had train.optimizers.main.eps = 1e-08, but this one has 1e-06" in other.err
    )
    assert sorted(p.name for p in training.iterdir()) == left
    resumed = pcs(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert set(tensors(concept)) == {"adapter.safetensors", "embeddings.safetensors"}
    assert tensors(concept) == tensors(whole)
    steps = [line.split('"step": ')[1].split(",")[0] for line in (training / "log.jsonl").read_text().splitlines()]
    assert steps == [str(i) for i in range(1, 23)]
    assert not list(training.glob("*checkpoint*"))


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_asked_to_stop_saves_its_state_and_reports_where(pcs, learn, whole, tmp_path, number, expected):
    concept, training = tmp_path / "cut" / "mug.concept", tmp_path / "cut" / "mug.training"
    arguments = learn("pivotal_tuning", *STEPS, f"output={concept}")
    process = started(arguments, tmp_path)
    try:
        wait_for(in_second_phase(training), process, tmp_path)
        process.send_signal(number)
        code = process.wait(120)
    finally:
        process.kill()
    stderr = (tmp_path / "stderr").read_text()
    assert code == expected and f"progress is saved in {training}; continue with --resume\nstopped\n" in stderr
    assert "Traceback" not in stderr and not concept.exists()
    assert len(list(training.glob("checkpoint-*"))) == 1
    assert pcs(*arguments, "--resume").code == 0 and tensors(concept) == tensors(whole)


def test_a_closed_terminal_does_not_lose_the_state(pcs, learn, whole, tmp_path):
    """When the terminal closes, the kernel sends SIGHUP, and printing fails from then on."""
    concept, training = tmp_path / "cut" / "mug.concept", tmp_path / "cut" / "mug.training"
    arguments = learn("pivotal_tuning", *STEPS, f"output={concept}")
    terminal, inside = os.openpty()
    streams = {"stdin": inside, "stdout": inside, "stderr": inside}
    process = started(arguments, tmp_path, ["setsid", "--ctty", "--wait"], **streams)
    os.close(inside)
    try:
        wait_for(in_second_phase(training), process, tmp_path)
        os.close(terminal)
        code = process.wait(120)
    finally:
        process.kill()
    assert code == 129 and not concept.exists() and len(list(training.glob("checkpoint-*"))) == 1
    assert pcs(*arguments, "--resume").code == 0 and tensors(concept) == tensors(whole)


def test_nohup_keeps_a_run_going_when_the_terminal_is_closed(learn, whole, tmp_path):
    concept, training = tmp_path / "cut" / "mug.concept", tmp_path / "cut" / "mug.training"
    process = started(learn("pivotal_tuning", *STEPS, f"output={concept}"), tmp_path, ["nohup"])
    try:
        wait_for(in_second_phase(training), process, tmp_path)
        process.send_signal(signal.SIGHUP)
        code = process.wait(300)
    finally:
        process.kill()
    assert code == 0 and tensors(concept) == tensors(whole)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("library", ["importlib.metadata", "typer", "torch"])
def test_a_signal_while_libraries_are_imported_ends_a_command_immediately(learn, tmp_path, number, expected, library):
    """The signal arrives within the first second of the process, just before `library` is imported."""
    code = IMPORTS.format(library=library, number=int(number))
    arguments = learn("pivotal_tuning", f"output={tmp_path / 'mug.concept'}")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (expected, "stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_resuming_without_an_interrupted_run_warns_that_it_starts_from_the_beginning(pcs, learn, tmp_path):
    with pytest.warns(UserWarning, match=r"mug\.training has no interrupted run to resume, so a new run starts"):
        assert pcs(*learn("textual_inversion", f"output={tmp_path / 'mug.concept'}"), "--resume").code == 0
    assert (tmp_path / "mug.concept" / "concept.json").is_file()


def test_the_error_for_a_damaged_checkpoint_states_what_to_do(pcs, learn, tmp_path):
    training = tmp_path / "mug.training"
    (training / "checkpoint-00-0000001").mkdir(parents=True)
    ran = pcs(*learn("textual_inversion", f"output={tmp_path / 'mug.concept'}"), "--resume")
    assert ran.code == 2 and "checkpoint-00-0000001 is damaged" in ran.err and "delete it to start over" in ran.err


def test_a_run_with_a_non_finite_loss_exits_with_1_and_keeps_its_state(pcs, learn, tmp_path):
    settings = ("trainable.tokens.lr=1e30", "train.steps=5", f"output={tmp_path / 'mug.concept'}")
    ran = pcs(*learn("textual_inversion", *settings))
    assert ran.code == 1 and "Lower the learning rate" in ran.err
    assert not (tmp_path / "mug.concept").exists() and list((tmp_path / "mug.training").glob("checkpoint-*"))
