"""Writes TensorBoard's event files."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from shared.io.failures import writing


class EventFile:
    """A new event file in a folder. The folder is created if it does not exist.

    Each event is written to the file before the call that logs it returns. torch's `SummaryWriter` is not used, because
    it writes in a separate thread. When the disk is full, that thread prints a traceback, and the error that reaches
    the caller does not name the file.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """Creates the file. TensorBoard hides the events from `purge_step` onwards in the folder's earlier files."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names
        self.path = folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = self.path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def scalar(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._write(step=step, summary=scalar(tag, value))

    def picture(self, tag: str, pixels: Tensor, step: int) -> None:
        """Writes a picture ([3, H, W] in [0, 1])."""
        from torch.utils.tensorboard.summary import image

        self._write(step=step, summary=image(tag, pixels.clamp(0, 1).numpy(), dataformats="CHW"))

    def close(self) -> None:
        self._file.close()

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

        with writing(self.path):
            self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
