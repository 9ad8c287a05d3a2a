"""Saves and loads training state.

A checkpoint is written under a temporary name and then renamed, so that a killed run leaves the previous state intact.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shared.io.failures import may_be_intact, writing
from shared.io.foreign_files import foreign_files, remove_written
from shared.io.outputs import write_text
from shared.io.temporary_names import beside, sweep

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class State:
    """Everything that a run needs in order to resume."""

    phase: int
    step: int  # steps done in this phase
    learned: Mapping[str, Tensor] = field(default_factory=dict)  # tokens and adapters
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    best: Mapping[str, Tensor] = field(default_factory=dict)  # learned tensors at the best score
    info: Mapping[str, Any] = field(default_factory=dict)  # recipe, best score, …
    carried: Mapping[str, Tensor] = field(default_factory=dict)  # passed on by earlier phases, in addition to `learned`


def save(folder: Path, state: State) -> Path:
    """Writes the folder `checkpoint-PP-SSSSSSS` (phase and step) and returns it. Removes older checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{PREFIX}{state.phase:02d}-{state.step:07d}"
    while target.exists():  # for the same step, keep the old checkpoint until the new one is complete
        target = target.with_name(target.name + "x")
    sweep(folder)
    temporary = beside(target)
    temporary.mkdir()
    try:
        with writing(target):
            _write(temporary, state)
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _checkpoints(folder):
        if old != target:
            _drop(old)
    return target


def _write(folder: Path, state: State) -> None:
    for name in ("learned", "optimizer", "best", "carried"):
        tensors = dict(getattr(state, name))
        if tensors:
            save_file(tensors, folder / f"{name}.safetensors")
    files = sorted(f.name for f in folder.iterdir())
    meta = {"written by": "pcs", "phase": state.phase, "step": state.step, "files": files, **state.info}
    (folder / "state.json").write_text(json.dumps(meta, indent=1))
    for file in folder.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _checkpoints(folder: Path) -> list[Path]:
    """Returns every path whose name starts with `PREFIX`, in order."""
    return sorted(folder.glob(f"{PREFIX}*"))


def load(folder: Path) -> State | None:
    """Loads the newest checkpoint, or returns None if there is none. Raises ValueError if it cannot be read."""
    checkpoints = _checkpoints(folder)
    if not checkpoints:
        return None
    path = checkpoints[-1]
    try:
        info = json.loads((path / "state.json").read_text())
        info.pop("written by", None)
        tensors = {Path(name).stem: _tensors(path / name) for name in info.pop("files")}
        return State(phase=int(info.pop("phase")), step=int(info.pop("step")), info=info, **tensors)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        if may_be_intact(error):
            raise
        what = str(error) or type(error).__name__
        raise ValueError(f"checkpoint {path} is damaged ({what}); delete it to start over") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    with file.open("rb"):  # safetensors reports every file that it cannot open as missing
        return load_file(file)


def amend(folder: Path, **info: Any) -> None:
    """Adds entries to the newest checkpoint's `info`, without changing its tensors.

    Raises AssertionError if there is no checkpoint.
    """
    checkpoints = _checkpoints(folder)
    assert checkpoints, f"no checkpoint in {folder}"
    file = checkpoints[-1] / "state.json"
    write_text(file, json.dumps({**json.loads(file.read_text()), **info}, indent=1))


def clear(folder: Path) -> None:
    """Removes the checkpoints, logs and samples that earlier runs wrote to their training folder, and nothing else."""
    drop(folder)
    remove_written(folder)


def clear_if_none(folder: Path) -> None:
    """Removes a training folder if it contains no checkpoint, because no run can then resume from it.

    Files that pcs did not write are kept.
    """
    if not folder.is_dir() or _checkpoints(folder):
        return
    clear(folder)
    with suppress(OSError):  # raised if the folder is not empty
        folder.rmdir()


def drop(folder: Path) -> None:
    """Removes a finished run's checkpoints, each of them atomically."""
    for path in reversed(_checkpoints(folder)):
        _drop(path)
    if folder.is_dir():
        sweep(folder)


def _drop(path: Path) -> None:
    if foreign_files(path, 1) if path.is_dir() and not path.is_symlink() else True:
        remove_written(path)  # files that pcs did not write are kept
        return
    gone = beside(path)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
