"""Locks that let only one command at a time write an output. They use `flock`, so they are released
however the process exits. Lock files are in the cache, so that a refused command leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.io.cache import cache_folder

if sys.platform != "win32":
    import fcntl

_held: dict[Path, int] | None = None  # place -> open lock file, while a command runs; None: locking is off


@contextmanager
def holding() -> Iterator[None]:
    """Keeps a lock on each output passed to `hold` until the command inside ends."""
    global _held
    if _held is not None or sys.platform == "win32":
        yield
        return
    _held = {}
    try:
        yield
    finally:
        for place, handle in _held.items():
            with suppress(OSError):
                _file(place).unlink(missing_ok=True)
            os.close(handle)
        _held = None


def hold(path: Path) -> None:
    """Locks `path` for this command. Raises ValueError, naming the process, if another one is writing there.

    Outside `holding`, or if the cache cannot be written, nothing is locked.
    """
    place = path.resolve()
    if _held is None or place in _held:
        return
    with suppress(OSError):
        _file(place).parent.mkdir(parents=True, exist_ok=True)
        _held[place] = _locked(path, _file(place))


def _locked(path: Path, file: Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(handle, 4096).decode(errors="replace") or "another process"
            os.close(handle)
            raise ValueError(
                f"{path} is being written by {who}: wait until it is done, or choose another output"
            ) from None
        with suppress(OSError):
            if os.path.samestat(os.fstat(handle), file.stat()):  # otherwise its holder has removed it in the meantime
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} (started {time.strftime('%H:%M:%S')})".encode())
                return handle
        os.close(handle)


def _file(place: Path) -> Path:
    return cache_folder() / "locks" / hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
