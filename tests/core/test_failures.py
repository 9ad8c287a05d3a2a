"""Failures of the machine (a full disk, too little memory, circular links): one line each, and nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from shared.backbones.added_tokens import TokenOverlay
from shared.benchmark.experiment import Experiment, benchmark, pictures
from shared.cli import run
from shared.io.decode import named_errors
from shared.io.locks import holding
from shared.io.outputs import atomic_folder, atomic_write, check_file, check_output
from shared.train import checkpoint
from shared.train.log import Log
from tests.conftest import build_clip_tokenizer

LARGE = torch.zeros(50_000)


@pytest.fixture
def small_files() -> Iterator[None]:
    """As on a full disk: no file may grow beyond 20 kB (`ulimit -f`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def told(capsys: Any, work: Callable[[], Any]) -> str:
    """The message of a command that does this."""
    app = typer.Typer()
    app.command()(lambda: work() and None)
    assert run(app, []) == 1
    return capsys.readouterr().err


def folder_of_tensors(root: Path) -> None:
    with atomic_folder(root / "x.concept") as folder:
        save_file({"a": LARGE}, folder / "adapter.safetensors")


def file_of_tensors(root: Path) -> None:
    with atomic_write(root / "x.concept") as file:
        save_file({"a": LARGE}, file)


def picture(root: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    with atomic_write(root / "x.concept") as file:
        Image.fromarray(noise).save(file, format="PNG")


@pytest.mark.parametrize("work", [folder_of_tensors, file_of_tensors, picture], ids=lambda w: w.__name__)
def test_a_full_disk_is_one_line_that_names_the_output(small_files: None, capsys, tmp_path: Path, work: Any) -> None:
    said = told(capsys, lambda: work(tmp_path))
    assert said.startswith(
        f"pcs: {tmp_path / 'x.concept'}: File too large; files cannot be this large here: raise the limit"
    )
    assert len(said.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_checkpoint_there_was(small_files: None, capsys, tmp_path: Path) -> None:
    before = checkpoint.save(tmp_path, checkpoint.State(0, 1, {"a": torch.ones(2)}))
    said = told(capsys, lambda: checkpoint.save(tmp_path, checkpoint.State(0, 2, {"a": LARGE})))
    assert said.startswith(f"pcs: {tmp_path / 'checkpoint-00-0000002'}: File too large;")
    assert list(tmp_path.iterdir()) == [before]
    state = checkpoint.load(tmp_path)
    assert state is not None and state.step == 1


def test_a_full_disk_while_a_run_is_logged_names_the_log(small_files: None, capsys, tmp_path: Path) -> None:
    log = Log(tmp_path, tensorboard=False)
    said = told(capsys, lambda: [log.scalars(step, {"loss" * 500: 1.0}) for step in range(20)])
    assert said.startswith(f"pcs: {tmp_path / 'log.jsonl'}: File too large;")


def raised(error: Exception) -> Any:
    raise error


def nested(depth: int) -> int:
    return nested(depth + 1) + 1


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (
            lambda: raised(MemoryError()),
            "out of memory: this machine does not have enough for this. To continue, use less",
        ),
        (lambda: np.ones(2**55), "out of memory: this machine does not have enough for this"),
        (
            lambda: torch.empty(2**45),
            "out of memory: this machine does not have enough for this (1.31e+05 GiB in a single allocation)",
        ),
        (
            lambda: raised(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total")),
            "out of memory: the GPU does not have enough for this (2.50 GiB in a single allocation)",
        ),
        (lambda: nested(0), "something is nested too deeply to be read"),
        (lambda: 10.0**400, "a number is too large"),
        (Path("/proc/version/x").read_text, "/proc/version/x: Not a directory"),
    ],
)
def test_every_failure_of_the_machine_says_what_and_what_to_do(capsys, work: Callable[[], Any], said: str) -> None:
    assert told(capsys, work).startswith(f"pcs: {said}")


def test_links_in_a_circle_are_told(capsys, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert f"pcs: {tmp_path / 'a'}: Too many levels of symbolic links; its links form a loop" in told(
        capsys, (tmp_path / "a").read_text
    )
    assert f"pcs: {tmp_path / 'a'}: Too many" in told(
        capsys, lambda: raised(RuntimeError(f"Symlink loop from '{tmp_path / 'a'}'"))
    )


def test_no_file_is_called_damaged_where_memory_ran_out() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)), named_errors(Path("a.png")):
            raise error


def test_a_prompt_that_is_not_utf8_is_refused_by_every_way_to_the_tokenizer() -> None:
    overlay = TokenOverlay({"text_encoder": build_clip_tokenizer()}, {"text_encoder": 32})
    for way in (
        lambda text: overlay.tokenize("text_encoder", [text], torch.device("cpu")),
        lambda text: overlay.overflow("text_encoder", text),
        lambda text: overlay.check_new([text]),
        lambda text: overlay.word_ids("text_encoder", text),
        lambda text: overlay.find_words("text_encoder", ["a mug"], text),
        lambda text: overlay.find("text_encoder", torch.zeros(1, 4, dtype=torch.long), (), text),
    ):
        with pytest.raises(ValueError, match="is not UTF-8 text"):
            way("caf\udce9")


# --- two commands with one output -------------------------------------------------------------

HOLDS = """
import sys, time
from pathlib import Path
from shared.io.locks import hold, holding
with holding():
    hold(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(100)
"""


def test_a_comparison_stops_where_the_disk_is_full_and_not_where_one_cell_needs_too_much_memory(tmp_path: Path) -> None:
    ran: list[str] = []

    def cell(failure: Exception) -> Callable[..., Any]:
        def run_cell(recipe: str, subject: str, folder: Path) -> Any:
            ran.append(recipe)
            raise failure

        return run_cell

    two = Experiment({"a": 1, "b": 2}, ["mug"], "a photo of a mug", range(1))
    table: Any = pictures()
    with pytest.raises(OSError, match="No space left"):
        benchmark(cell(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))), two, tmp_path / "full", table)
    assert ran == ["a"] and not list((tmp_path / "full").rglob("cell.json"))
    failures = benchmark(cell(MemoryError()), two, tmp_path / "small", table).failures
    assert ran == ["a", "a", "b"] and len(failures) == 2


def test_an_output_is_one_command_s_until_it_ends_or_is_killed(tmp_path: Path) -> None:
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
        assert check_output(out) == check_output(out) == out, "it is free, and this command's own"
        check_file(tmp_path / "a.png")
        second = subprocess.run([sys.executable, "-c", HOLDS, out], capture_output=True, text=True)
        assert second.returncode == 1 and "is being written by process" in second.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x.concept"], "nothing lies beside the output"
