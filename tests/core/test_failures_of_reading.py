"""An intact file or model is never called damaged because memory or file descriptors run out while it is read."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trimesh
import typer
from av.error import MemoryError as LibavMemoryError
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

from pcs_3d.guidance.prompt_debias import PromptDebias
from pcs_3d.meshes.read_mesh import read_mesh
from pcs_video.backbones.animatediff import with_motion
from shared.cli import run
from shared.concept.lora_tensors import read_lora_file
from shared.io.clips.clip_metadata import read_clip_metadata
from shared.io.clips.find_clips import find_clips
from shared.io.clips.open_frames import open_frames
from shared.io.clips.video_files import VideoFile
from shared.io.contact_sheets import read_metadata
from shared.io.decode import read_picture
from shared.io.find_pictures import _not_a_picture
from shared.io.foreign_files import _json, _png_text
from shared.io.model_folders import load_network
from shared.io.read_subject import transparent
from shared.io.safetensors_files import safe_load_safetensors
from shared.io.text_files import read_text_file
from shared.metrics.clips.paths import known_motion
from shared.metrics.clips.report import ClipReport
from shared.metrics.report import Report
from shared.pretrain.toybox.evaluate_backbone import open_pipeline
from shared.sources.phase_pictures import KEPT, read_kept
from shared.toybox.reference_sets import shown_in
from shared.train import checkpoint
from shared.train.device import pick_device
from tests.core.clip_files import noisy, video
from tests.core.test_pretrain import LayerTask
from tests.video.clip_models import motion_adapter


@contextmanager
def no_more_files() -> Iterator[None]:
    """Lets the process open no more files, as if its limit (`ulimit -n`) had been reached."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with one intact file of each kind."""
    Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(tmp_path / "a.png")
    video(tmp_path / "a.mp4", noisy())
    trimesh.creation.icosphere(2).export(tmp_path / "a.obj")
    save_file(
        {"a.lora_up.weight": torch.ones(1, 1), "a.lora_down.weight": torch.ones(1, 1)}, tmp_path / "a.safetensors"
    )
    (tmp_path / "report.json").write_text(json.dumps({"schema_version": 0, "medium": "clips"}))
    (tmp_path / KEPT).write_text('{"kept": []}')
    checkpoint.save(tmp_path, checkpoint.State(0, 1, {"a": torch.ones(2)}))
    return tmp_path


READERS: dict[str, Callable[[Path], Any]] = {
    "text": lambda folder: read_text_file(folder / KEPT, "the list"),
    "tensors": lambda folder: safe_load_safetensors(folder / "a.safetensors"),
    "LoRA": lambda folder: read_lora_file(folder / "a.safetensors"),
    "checkpoint": lambda folder: checkpoint.load(folder),
    "kept pictures": read_kept,
    "report": Report.load,
    "report of clips": ClipReport.load,
    "picture": lambda folder: read_picture(folder / "a.png"),
    "listed picture": lambda folder: _not_a_picture(folder / "a.png"),
    "transparency": lambda folder: transparent(folder / "a.png"),
    "PNG text": lambda folder: read_metadata(folder / "a.png"),
    "album": lambda folder: shown_in([folder / "a.png"]),
    "made by pcs": lambda folder: _png_text(folder / "a.png"),
    "list of files": lambda folder: _json(folder / KEPT),
    "video": lambda folder: VideoFile(folder / "a.mp4"),
    "frames": lambda folder: open_frames(folder / "a.mp4"),
    "listed clip": find_clips,
    "clip metadata": lambda folder: read_clip_metadata(folder / "a.mp4"),
    "motion": lambda folder: known_motion([folder / "a.mp4"]),
    "mesh": lambda folder: read_mesh(folder / "a.obj"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", READERS)
def test_a_file_is_not_called_missing_or_damaged_when_too_many_files_are_open(kind: str, files: Path) -> None:
    try:
        READERS[kind](files)  # imports what the reader needs
    except ValueError as error:
        assert "schema version" in str(error)
    with pytest.raises(OSError) as raised, no_more_files():
        READERS[kind](files)
    assert raised.value.errno == errno.EMFILE


def test_a_texture_is_not_dropped_when_too_many_files_are_open(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trimesh ignores textures that it cannot read."""
    (files / "a.obj").write_text("mtllib a.mtl\nusemtl m\nv 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nf 1/1 2/1 3/1\n")
    (files / "a.mtl").write_text("newmtl m\nmap_Kd a.png\n")
    read_mesh(files / "a.obj")
    plain = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.suffix == ".png":
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return plain(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(OSError, match="Too many open files"):
        read_mesh(files / "a.obj")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ENOMEM])
def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(
    files: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A user would delete it, as the message about a damaged one says."""

    def fails(path: Path, **_: Any) -> str:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", fails)
        for load in (checkpoint.load, read_kept):
            with pytest.raises(OSError) as raised:
                load(files)
            assert raised.value.errno == number
    (files / "checkpoint-00-0000001" / "learned.safetensors").unlink()
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(files)


def raising(error: Exception) -> Callable[..., Any]:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    return fails


ALLOCATOR = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


@pytest.mark.parametrize(
    ("place", "error", "work"),
    [
        ("trimesh.load_scene", MemoryError(), lambda folder, pipe: read_mesh(folder / "a.obj")),
        ("av.open", LibavMemoryError(errno.ENOMEM, "Cannot allocate memory"), lambda folder, pipe: VideoFile(folder / "a.mp4")),
        ("diffusers.UNetMotionModel.from_unet2d", ALLOCATOR, lambda folder, pipe: with_motion(pipe, motion_adapter())),
        ("diffusers.StableDiffusionPipeline.from_pretrained", ALLOCATOR, lambda folder, pipe: open_pipeline(None)),
        ("safetensors.torch.load_file", MemoryError(), lambda folder, pipe: load_network(type(pipe.unet), folder / "unet")),
        ("transformers.AutoTokenizer.from_pretrained", OSError(errno.ENOMEM, "Cannot allocate memory"),
         lambda folder, pipe: PromptDebias(model=folder).prompts("a dog", {})),
        ("torch.empty", torch.OutOfMemoryError("CUDA out of memory"), lambda folder, pipe: pick_device("cpu")),
        ("torch.nn.Module.load_state_dict", ALLOCATOR,
         lambda folder, pipe: LayerTask().load_state_dict(LayerTask().state_dict())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_nothing_is_called_damaged_when_memory_runs_out(
    place: str, error: Exception, work: Any, files: Path, tiny_sd: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_sd.unet.save_pretrained(files / "unet")
    app = typer.Typer()
    app.command()(lambda: work(files, tiny_sd) and None)
    monkeypatch.setattr(place, raising(error))
    assert run(app, []) == 1
    assert capsys.readouterr().err.startswith("pcs: out of memory: ")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        LibavMemoryError(errno.ENOMEM, "Cannot allocate memory"),
        SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
    ],
)
def test_a_lack_of_memory_is_recognized_in_the_exceptions_of_every_library(error: Exception, capsys: Any) -> None:
    app = typer.Typer()
    app.command()(lambda: raising(error)() and None)
    assert run(app, []) == 1
    assert capsys.readouterr().err.startswith("pcs: out of memory: this machine does not have enough")
