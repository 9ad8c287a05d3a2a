"""Handles requests to stop: Ctrl-C, SIGTERM (from a scheduler or a shutdown) and SIGHUP (from a closed terminal).

A run completes its current step first. This module is cheap to import, because the command line installs the handlers
before it imports anything heavy.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_STOPS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
_received: list[int] = []


def heed_stops() -> None:
    """Makes the stop signals raise KeyboardInterrupt, except those that the process ignores (as under nohup).

    Must be called in the main thread.
    """
    _received.clear()
    for number in _STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


def exit_code() -> int:
    """Returns the exit code of a stopped program: 128 plus the number of the last signal.

    Returns 130, the code for Ctrl-C, if no signal was recorded.
    """
    return 128 + (_received or [signal.SIGINT])[-1]


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Inside the context, the first signal only sets the event, so that the current step can finish and the state can
    be saved. A second signal takes effect immediately.

    Raises KeyboardInterrupt if an earlier signal's exception was swallowed, for example by a bare `except:` while a
    library was imported.
    """
    if _received:
        raise KeyboardInterrupt
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: h for n in _STOPS if (h := signal.getsignal(n)) not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def wait_for_the_step(number: int, frame: Any) -> None:
        _noted(number)
        stop.set()
        restore()

    for number in before:
        signal.signal(number, wait_for_the_step)
    try:
        yield stop
    finally:
        restore()
        if not _heeded():
            _received.clear()


def _raise(number: int, frame: Any) -> None:
    _noted(number)
    raise KeyboardInterrupt


def _heeded() -> bool:
    return any(signal.getsignal(n) is _raise for n in _STOPS)


def _noted(number: int) -> None:
    _received.append(number)
    for stream in (1, 2):  # printing to a closed terminal would fail before the state is saved
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)
