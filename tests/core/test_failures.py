"""Machine failures, such as a full disk or too little memory, cause a one-line error and leave nothing behind."""

from __future__ import annotations

import errno
import os
import resource
import threading
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
from shared.backbones.load import load_backbone
from shared.benchmark.experiment import Experiment, benchmark, pictures
from shared.cli import run
from shared.concept.concept_folder import read as read_folder
from shared.concept.lora_tensors import read_lora_file
from shared.io.clips.find_clips import find_clips
from shared.io.decode import named_errors
from shared.io.outputs import atomic_folder, atomic_write
from shared.io.read_subject import read_subject
from shared.recipe.catalog import find
from shared.runner.judging import check_folders
from shared.train import checkpoint
from shared.train.log import Log
from tests.conftest import build_clip_tokenizer
from tests.core.runs import session, small

LARGE = torch.zeros(50_000)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limits files to 20 kB (`ulimit -f`), so that writing more fails as it would on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def told(capsys: Any, work: Callable[[], Any]) -> str:
    """Returns what a command prints to stderr when `work` fails inside it."""
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
def test_a_full_disk_is_reported_in_one_line_that_names_the_output(
    small_files: None, capsys, tmp_path: Path, work: Any
) -> None:
    said = told(capsys, lambda: work(tmp_path))
    assert said.startswith(
        f"pcs: {tmp_path / 'x.concept'}: File too large; this exceeds the limit on file sizes: raise the limit"
    )
    assert len(said.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_the_previous_checkpoint_survives_a_full_disk(small_files: None, capsys, tmp_path: Path) -> None:
    before = checkpoint.save(tmp_path, checkpoint.State(0, 1, {"a": torch.ones(2)}))
    said = told(capsys, lambda: checkpoint.save(tmp_path, checkpoint.State(0, 2, {"a": LARGE})))
    assert said.startswith(f"pcs: {tmp_path / 'checkpoint-00-0000002'}: File too large;")
    assert list(tmp_path.iterdir()) == [before]
    state = checkpoint.load(tmp_path)
    assert state is not None and state.step == 1


def test_the_error_for_a_full_disk_while_logging_names_the_log(small_files: None, capsys, tmp_path: Path) -> None:
    log = Log(tmp_path, tensorboard=False)
    said = told(capsys, lambda: [log.scalars(step, {"loss" * 500: 1.0}) for step in range(20)])
    assert said.startswith(f"pcs: {tmp_path / 'log.jsonl'}: File too large;")


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing_behind(
    small_files: None, tiny: Any, photos: Path, tmp_path: Path, tensorboard: bool
) -> None:
    recipe = small("dreambooth_lora", "train.steps=2", "train.checkpoint_every=1")
    folder = tmp_path / "run.training"
    run_ = session(tiny(), recipe, photos, folder, tensorboard=tensorboard)
    with pytest.raises(OSError, match="File too large"):
        for _ in run_.steps():
            assert (folder / "log.jsonl").exists()
    assert not folder.exists()
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="File too large"):
        list(session(tiny(), recipe, photos, folder, tensorboard=tensorboard).steps())
    assert (folder / "notes.txt").read_text() == "mine", "a folder that existed before the run must be kept"


def logged(log: Log, draw: Callable[[Log, int], None]) -> bool:
    try:
        for step in range(2000):
            draw(log, step)
    finally:
        log.close()
    return True


@pytest.mark.parametrize(
    "draw",
    [
        lambda log, step: log.scalars(step, {"loss": 1.0}),
        lambda log, step: log.picture(step, "sample", torch.rand(3, 100, 100)),
    ],
    ids=["scalars", "pictures"],
)
def test_a_full_disk_while_writing_tensorboard_events_is_reported_in_one_line(
    small_files: None, capsys, tmp_path: Path, draw: Callable[[Log, int], None]
) -> None:
    threads = set(threading.enumerate())
    said = told(capsys, lambda: logged(Log(tmp_path), draw))
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert said.startswith(f"pcs: {events}: File too large;") and len(said.splitlines()) == 1
    assert set(threading.enumerate()) <= threads


def raised(error: Exception) -> Any:
    raise error


def nested(depth: int) -> int:
    return nested(depth + 1) + 1


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (
            lambda: raised(MemoryError()),
            "out of memory: this machine does not have enough for this. To continue, choose a smaller",
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
        (
            lambda: LARGE.clamp_max(1e300),
            "a number is too large (value cannot be converted to type float without overflow)",
        ),
        (Path("/proc/version/x").read_text, "/proc/version/x: Not a directory"),
    ],
)
def test_every_machine_failure_is_explained(capsys, work: Callable[[], Any], said: str) -> None:
    assert told(capsys, work).startswith(f"pcs: {said}")


def test_links_that_form_a_loop_are_reported(capsys, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert f"pcs: {tmp_path / 'a'}: Too many levels of symbolic links; its symbolic links form a loop" in told(
        capsys, (tmp_path / "a").read_text
    )
    assert f"pcs: {tmp_path / 'a'}: Too many" in told(
        capsys, lambda: raised(RuntimeError(f"Symlink loop from '{tmp_path / 'a'}'"))
    )


def test_inputs_whose_links_form_a_loop_are_not_reported_as_missing(tmp_path: Path) -> None:
    loop = tmp_path / "f" / "l1"
    loop.parent.mkdir()
    loop.symlink_to("l2")
    (tmp_path / "f" / "l2").symlink_to("l1")
    (tmp_path / "f" / "l1.yaml").symlink_to("l1")
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    for work in (
        lambda: read_subject(loop),
        lambda: read_subject(tmp_path / "f"),
        lambda: read_subject(tmp_path / "a.png", masks=loop),
        lambda: read_subject(tmp_path / "a.png", captions=loop),
        lambda: find_clips(loop),
        lambda: read_folder(loop),
        lambda: read_lora_file(loop),
        lambda: find(str(loop), "image"),
        lambda: find(f"{loop}.yaml", "image"),
        lambda: load_backbone(str(loop)),
        lambda: check_folders(loop, None),
    ):
        with pytest.raises(ValueError, match="symbolic links form a loop"):
            work()


def test_a_file_is_not_reported_as_damaged_when_memory_runs_out() -> None:
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)), named_errors(Path("a.png")):
            raise error


def test_every_method_that_tokenizes_refuses_a_prompt_that_is_not_utf8() -> None:
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


# --- comparisons ------------------------------------------------------------------------------


def test_a_comparison_stops_at_a_full_disk_but_not_when_one_cell_runs_out_of_memory(tmp_path: Path) -> None:
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
