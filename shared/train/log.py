"""Logs of a run: JSON lines for machines, TensorBoard for people."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from shared.io.outputs import write_text
from shared.train.loop import Record


class Log:
    """`log.jsonl` and TensorBoard events in one folder, made when there is something to write.

    On resume, lines past the resumed step are dropped.
    """

    def __init__(self, folder: Path, start: int = 0, tensorboard: bool = True) -> None:
        self.folder, self.path, self.start, self.tensorboard = folder, folder / "log.jsonl", start, tensorboard
        self._file: TextIO | None = None
        self._board: Any = None

    def _open(self) -> TextIO:
        if self._file is not None:
            return self._file
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.start == 0:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "tensorboard", ignore_errors=True)
        elif self.path.exists():
            kept = [line for line in self.path.read_text().splitlines() if _step(line) <= self.start]
            write_text(self.path, "".join(line + "\n" for line in kept))
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=self.start + 1 if self.start else None
            )
        self._file = self.path.open("a", encoding="utf-8")
        return self._file

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        file = self._open()
        plain = {k: v if math.isfinite(v) else None for k, v in values.items()}  # JSON knows no NaN
        file.write(json.dumps({"step": step, **plain}, allow_nan=False) + "\n")
        file.flush()
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def picture(self, step: int, name: str, pixels: Tensor) -> None:
        """`pixels` [3, H, W] in [0, 1]."""
        self._open()
        if self._board is not None:
            self._board.add_image(name, pixels.clamp(0, 1).numpy(), step)

    def samples(self, step: int, pixels: Tensor) -> None:
        """Pictures [N, 3, H, W] in [-1, 1] of the state in training: a sheet in `samples/`, and each in TensorBoard."""
        from shared.io.contact_sheets import grid

        folder = self.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid(pixels).save(folder / f"step-{step:06d}.png")
        for i, picture in enumerate(pixels):
            self.picture(step, f"sample/{i}", (picture + 1) / 2)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def flat(record: Record) -> dict[str, float]:
    """What is logged of one step."""
    rates = {f"lr/{k}": v for k, v in record.lr.items()}
    parts = {f"loss/{k}": v for k, v in record.parts.items()}
    loss = {} if record.loss is None else {"loss": record.loss}
    return {**loss, **parts, **rates, "grad_norm": record.grad_norm}


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut by a kill
        return 2**62
