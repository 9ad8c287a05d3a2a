"""Logs a run, both as JSON lines for programs and as TensorBoard events for people."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from torch import Tensor

from shared.io.failures import writing
from shared.io.foreign_files import claim, foreign_files
from shared.io.outputs import write_text
from shared.io.terminal import names
from shared.train.event_file import EventFile
from shared.train.loop import Record


def check_log(folder: Path) -> None:
    """Raises ValueError when a log or sample pictures would replace files that pcs did not write."""
    foreign = foreign_files(folder, sys.maxsize) if folder.is_dir() else []
    in_the_way = [f for f in foreign if f.split("/")[0] in ("log.jsonl", "samples", "phases")]
    if in_the_way:
        raise ValueError(
            f"{folder} contains files that pcs did not write and that training would replace ({names(in_the_way)}): "
            "move them elsewhere"
        )


class Log:
    """Writes `log.jsonl` and TensorBoard events into one folder, which is created on the first write.

    If the folder already contains a log, its lines after step `start` are dropped. Every written file is added to the
    folder's list of files (`shared.io.foreign_files`). Raises ValueError when a file that pcs did not write would be
    replaced.
    """

    def __init__(self, folder: Path, start: int = 0, tensorboard: bool = True) -> None:
        self.folder, self.path, self.start, self.tensorboard = folder, folder / "log.jsonl", start, tensorboard
        check_log(folder)
        self._file: TextIO | None = None
        self._board: EventFile | None = None

    def _open(self) -> TextIO:
        if self._file is not None:
            return self._file
        self.folder.mkdir(parents=True, exist_ok=True)
        claim(self.folder, self.path.name)
        if self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= self.start]
            write_text(self.path, "".join(line + "\n" for line in kept))
        if self.tensorboard:
            folder = self.folder / "tensorboard"
            resumed = folder.is_dir() and any(folder.iterdir())
            self._board = EventFile(folder, self.start + 1 if resumed else None)
            claim(self.folder, f"tensorboard/{self._board.path.name}", made=True)
        self._file = self.path.open("a", encoding="utf-8")
        return self._file

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        file = self._open()
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON has no NaN
        with writing(self.path):
            file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
            file.flush()
        if self._board is not None:
            for key, value in values.items():
                self._board.scalar(key, value, step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """Logs a picture ([3, H, W] in [0, 1]) to TensorBoard."""
        self._open()
        if self._board is not None:
            self._board.picture(name, pixels, step)

    def samples(self, step: int, pixels: Tensor) -> None:
        """Logs generated pictures ([N, 3, H, W]) or clips ([N, 3, F, H, W]) in [-1, 1].

        Writes all of them as one sheet to `samples/`, and each of them separately to TensorBoard.
        """
        from shared.io.contact_sheets import grid, stills, write_picture

        pixels = stills(pixels)

        file = f"samples/step-{step:06d}.png"
        claim(self.folder, file)
        write_picture(grid(pixels), self.folder / file)
        for i, picture in enumerate(pixels):
            self.picture(step, f"sample/{i}", (picture + 1) / 2)

    def close(self) -> None:
        """Closes the files. Errors are ignored, because any failed write has already been reported."""
        for file in (self._file, self._board):
            if file is not None:
                with suppress(OSError):
                    file.close()


def flat(record: Record) -> dict[str, float]:
    """Returns the values logged for one step, by name."""
    rates = {f"lr/{k}": v for k, v in record.lr.items()}
    parts = {f"loss/{k}": v for k, v in record.parts.items()}
    loss = {} if record.loss is None else {"loss": record.loss}
    return {**loss, **parts, **rates, "grad_norm": record.grad_norm}


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line is incomplete, because the process was killed
        return 2**62
