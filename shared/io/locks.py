"""One command at a time writes an output. The lock is the operating system's (`flock`): it ends with the process that
holds it, however that ends. It lies in the cache, so that a command that is refused leaves nothing beside the output."""

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

_held: dict[Path, int] | None = None  # place -> open lock file, while a command runs; None: nobody asked for locks


@contextmanager
def holding() -> Iterator[None]:
    """While a command runs: each output that it checks (`hold`) is its own until the end."""
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
    """This command's own from here on. ValueError, naming the process, while another one writes there.

    Without `holding`, and where no cache can be written, nothing is locked.
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
            if os.path.samestat(os.fstat(handle), file.stat()):  # else its holder ended, and removed it, meanwhile
                os.ftruncate(handle, 0)
                os.write(handle, f"process {os.getpid()} (begun {time.strftime('%H:%M:%S')})".encode())
                return handle
        os.close(handle)


def _file(place: Path) -> Path:
    return cache_folder() / "locks" / hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
