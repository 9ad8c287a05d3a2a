"""Locks outputs, so that only one command at a time can write to each output.

The locks use `flock`, so they are released however the process exits. The lock files are in the system's temporary
folder, where all users of the machine can see them. A refused command therefore leaves no files next to the output.
Lock files contain paths only as hashes, so that users cannot see what others write.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shared.io.terminal import encodable

if sys.platform != "win32":
    import fcntl

# not $TMPDIR, which may differ between users
_TEMPORARY = Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())
_PATIENCE = 0.2  # seconds; longer than another command takes to check a lock

_held: dict[str, int] | None = None  # key -> open lock file, while a command runs; None while locking is off


@contextmanager
def holding() -> Iterator[None]:
    """Keeps a lock on each output passed to `hold` until the enclosed block ends, or until the outermost one does if
    blocks are nested. `pcs` encloses every command; `@holding()` encloses a function that is also called from Python."""
    global _held
    if _held is not None or sys.platform == "win32":
        yield
        return
    _held = {}
    try:
        yield
    finally:
        for key, handle in _held.items():
            with suppress(OSError):
                (_folder() / key).unlink(missing_ok=True)
            os.close(handle)
        _held = None


def hold(path: Path) -> None:
    """Locks `path` for this command. Does nothing outside `holding`.

    Raises ValueError, naming the process, if another process is writing `path`, something inside it, or a folder that
    contains it. If the lock file cannot be used, issues a UserWarning and continues without a lock.
    """
    place = Path(os.path.realpath(path))
    key = _key(place)
    if _held is None or key in _held:
        return
    around = [_key(parent) for parent in place.parents]
    try:
        _make_folder()
        handle = _locked(path, key, around)
    except OSError as error:
        why = error.strerror or type(error).__name__
        message = f"{path} cannot be locked ({why}): make sure that no other command writes to it"
        warnings.warn(encodable(message), UserWarning, stacklevel=3)
        return
    _held[key] = handle
    try:
        _check_nested(path, key, around)
    except ValueError:
        del _held[key]
        (_folder() / key).unlink(missing_ok=True)
        os.close(handle)
        raise


def _locked(path: Path, key: str, around: list[str]) -> int:
    file = _folder() / key
    while True:
        handle = _open(file)
        if not _taken(handle, fcntl.LOCK_EX):
            raise _busy(path, handle)
        with suppress(FileNotFoundError):  # the previous holder may have removed the file in the meantime
            if os.path.samestat(os.fstat(handle), file.stat()):
                with suppress(OSError):  # on a full disk, the lock works but does not name its owner
                    os.ftruncate(handle, 0)
                    about = [f"process {os.getpid()} (started {time.strftime('%H:%M:%S')})", *around]
                    os.pwrite(handle, "\n".join(about).encode(), 0)
                return handle
        os.close(handle)


def _open(file: Path) -> int:
    """Opens a lock file, first without O_CREAT, which Linux forbids for other users' files in a shared folder."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        return os.open(file, flags)
    with suppress(FileExistsError):
        handle = os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666)
        os.fchmod(handle, 0o666)  # regardless of the umask
        return handle
    return os.open(file, flags)


def _taken(handle: int, how: int) -> bool:
    """Whether the lock was free and is now held through `handle`."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(_PATIENCE / 10)


def _check_nested(path: Path, key: str, around: list[str]) -> None:
    """Raises ValueError if another command has locked something inside `path`, or a folder that contains it."""
    for file in _folder().iterdir():
        with suppress(OSError):
            if file.name in (_held or {}) or not (file.name in around or key in file.read_text().split("\n")[1:]):
                continue
            handle = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if not _taken(handle, fcntl.LOCK_SH):
                raise _busy(path, handle)
            os.close(handle)


def _busy(path: Path, handle: int) -> ValueError:
    who = os.pread(handle, 4096, 0).decode(errors="replace").partition("\n")[0] or "another process"
    os.close(handle)
    return ValueError(f"{path} is being written by {who}: wait until it is done, or choose another output")


def _folder() -> Path:
    return _TEMPORARY / "pcs-locks"


def _make_folder() -> None:
    if not _folder().is_dir():
        _folder().mkdir(exist_ok=True)
        _folder().chmod(0o1777)  # like /tmp: all users may create lock files, but remove only their own


def _key(place: Path) -> str:
    return hashlib.sha256(os.fsencode(place)).hexdigest()[:32]
