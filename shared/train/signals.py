"""Ctrl-C that waits for the step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """The first Ctrl-C lets the step end and the state be saved; the second acts at once."""
    stop = threading.Event()
    before = signal.getsignal(signal.SIGINT)
    ignored = before == signal.SIG_IGN  # nohup and background jobs: Ctrl-C is not for this process
    if ignored or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handler(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
