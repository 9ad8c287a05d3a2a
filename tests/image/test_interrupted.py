"""A real process, killed or asked to stop in mid-training, and the run that goes on afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared.cli import build, run

STEPS = ("phases.pivot.train.steps=2", "phases.tune.train.steps=30", "train.checkpoint_every=1", "train.batch_size=1")


def started(arguments: list[str], tmp_path: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "shared.cli", *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "stderr").open("w"),
    )


def wait_for(what, process: subprocess.Popen, tmp_path: Path, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "stderr").read_text()
        time.sleep(0.02)


def in_second_phase(training: Path):
    return lambda: any(p.name >= "checkpoint-01-0000003" for p in training.glob("checkpoint-*"))


@pytest.fixture(scope="module")
def whole(learn, tmp_path_factory) -> Path:
    """The same run, not interrupted."""
    concept = tmp_path_factory.mktemp("whole") / "mug.concept"
    assert run(build(), learn("pivotal_tuning", *STEPS, f"output={concept}")) == 0
    return concept


def tensors(concept: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in concept.glob("*.safetensors")}


def test_a_kill_in_mid_training_then_resume_gives_the_same_tensors(pcs, learn, whole, tmp_path):
    concept, training = tmp_path / "cut" / "mug.concept", tmp_path / "cut" / "mug.training"
    arguments = learn("pivotal_tuning", *STEPS, f"output={concept}")
    process = started(arguments, tmp_path)
    try:
        wait_for(in_second_phase(training), process, tmp_path)
    finally:
        process.kill()  # SIGKILL: nothing of ours runs any more
    assert process.wait() == -signal.SIGKILL and not concept.exists()
    left = sorted(p.name for p in training.iterdir())
    refused = pcs(*arguments)
    assert refused.code == 2 and "holds an interrupted run: go on with --resume" in refused.err
    other = pcs(*arguments, "train.optimizers.main.eps=1e-6", "--resume")
    assert (
        other.code == 2 and "the interrupted run had train.optimizers.main.eps = 1e-08, this one has 1e-06" in other.err
    )
    assert sorted(p.name for p in training.iterdir()) == left
    resumed = pcs(*arguments, "--resume")
    assert resumed.code == 0, resumed.err
    assert set(tensors(concept)) == {"adapter.safetensors", "embeddings.safetensors"}
    assert tensors(concept) == tensors(whole)
    steps = [line.split('"step": ')[1].split(",")[0] for line in (training / "log.jsonl").read_text().splitlines()]
    assert steps == [str(i) for i in range(1, 33)]
    assert not list(training.glob("*checkpoint*"))


def test_ctrl_c_saves_says_where_and_exits_with_130(pcs, learn, whole, tmp_path):
    concept, training = tmp_path / "cut" / "mug.concept", tmp_path / "cut" / "mug.training"
    arguments = learn("pivotal_tuning", *STEPS, f"output={concept}")
    process = started(arguments, tmp_path)
    try:
        wait_for(in_second_phase(training), process, tmp_path)
        process.send_signal(signal.SIGINT)
        code = process.wait(120)
    finally:
        process.kill()
    said = (tmp_path / "stderr").read_text()
    assert code == 130 and f"the state is in {training}: go on with --resume\nstopped\n" in said
    assert "Traceback" not in said and not concept.exists()
    assert len(list(training.glob("checkpoint-*"))) == 1
    assert pcs(*arguments, "--resume").code == 0 and tensors(concept) == tensors(whole)


def test_resume_without_an_interrupted_run_says_that_it_begins(pcs, learn, tmp_path):
    with pytest.warns(UserWarning, match=r"mug\.training holds no interrupted run: this one starts at the beginning"):
        assert pcs(*learn("textual_inversion", f"output={tmp_path / 'mug.concept'}"), "--resume").code == 0
    assert (tmp_path / "mug.concept" / "concept.json").is_file()


def test_a_damaged_checkpoint_says_what_to_do(pcs, learn, tmp_path):
    training = tmp_path / "mug.training"
    (training / "checkpoint-00-0000001").mkdir(parents=True)
    ran = pcs(*learn("textual_inversion", f"output={tmp_path / 'mug.concept'}"), "--resume")
    assert ran.code == 2 and "checkpoint-00-0000001 is damaged" in ran.err and "delete it to start anew" in ran.err


def test_a_loss_that_is_no_number_ends_with_1_and_keeps_the_state(pcs, learn, tmp_path):
    settings = ("trainable.tokens.lr=1e30", "train.steps=5", f"output={tmp_path / 'mug.concept'}")
    ran = pcs(*learn("textual_inversion", *settings))
    assert ran.code == 1 and "Lower the learning rate" in ran.err
    assert not (tmp_path / "mug.concept").exists() and list((tmp_path / "mug.training").glob("checkpoint-*"))
