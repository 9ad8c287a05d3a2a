"""Creates temporary names for unfinished outputs, and cleans up after killed processes.

`.NAME.HOST-PID-RANDOM.partial` is an unfinished file or folder, and `.NAME.HOST-PID-RANDOM.replaced` is the previous
version of NAME.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import secrets
import shutil
import socket
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

# Earlier versions put the extension last; their leftovers are removed too.
_NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>partial|replaced)(\..*)?")

_HERE, _EXCHANGE = -100, 2  # Linux's AT_FDCWD and RENAME_EXCHANGE


def beside(path: Path) -> Path:
    """Returns an unused hidden name in the same folder, and thus on the same file system.

    The extension also differs, so that a file left behind by a killed process is not mistaken for a complete one.
    """
    return path.with_name(f".{path.name}.{_tag()}.partial")


def replaced(path: Path) -> Path:
    """Returns an unused hidden name, under which the old `path` is kept until the new one is in place."""
    return path.with_name(f".{path.name}.{_tag()}.replaced")


def exchanged(one: Path, other: Path) -> bool:
    """Atomically exchanges two names on one file system if the system supports it (Linux's renameat2). Returns whether the
    names were exchanged."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def is_temporary(name: str) -> bool:
    """Whether a name has the form that `beside` and `replaced` create."""
    return _NAME.fullmatch(name) is not None


def sweep(folder: Path) -> None:
    """Removes half-written outputs that dead processes on this machine left directly in a folder.

    If a process was killed after moving the old output aside and before putting the new one in place, the old output is
    restored.
    """
    for entry in folder.iterdir():
        match = _NAME.fullmatch(entry.name)
        if match is None or match["host"] != _host() or _alive(int(match["pid"])):
            continue
        target = folder / match["name"]
        with suppress(OSError):  # another process may be cleaning up too
            if match["kind"] == "replaced" and not target.exists():
                entry.rename(target)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


@lru_cache(maxsize=256)
def sweep_once(folder: Path) -> None:
    """Calls `sweep` the first time this process writes into a folder."""
    if folder.is_dir():
        sweep(folder)


def _tag() -> str:
    return f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


@lru_cache(maxsize=1)
def _host() -> str:
    """Returns six hexadecimal digits that identify this machine.

    Temporary names contain these digits because machines that share a disk cannot check each other's processes.
    """
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _alive(pid: int) -> bool:
    """Whether a process is running; True if that cannot be checked."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
