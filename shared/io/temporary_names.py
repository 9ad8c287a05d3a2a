"""Names for what is being written, and the removal of what killed processes have left under such names.

`.NAME.HOST-PID-RANDOM.partial` is half a file or folder; `.NAME.HOST-PID-RANDOM.replaced` is what NAME was until now.
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

_NAME = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{6})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>partial|replaced)(\..*)?")

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def beside(path: Path) -> Path:
    """A free hidden name in the same folder, on the same file system, with the same ending."""
    return path.with_name(f".{path.stem}.{_tag()}.partial{path.suffix}")


def replaced(path: Path) -> Path:
    """A free hidden name for what `path` was, until the new one has its place."""
    return path.with_name(f".{path.name}.{_tag()}.replaced")


def exchanged(one: Path, other: Path) -> bool:
    """Let two names on one file system change places in one moment, where the system can (Linux' renameat2); whether it
    has."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def is_temporary(name: str) -> bool:
    """Whether a name is one of those that `beside` and `replaced` give."""
    return _NAME.fullmatch(name) is not None


def sweep(folder: Path) -> None:
    """Remove what processes of this machine that are dead have left half-written directly in a folder.

    One that was killed between moving the old output aside and putting the new one there gets its old output back.
    """
    for entry in folder.iterdir():
        match = _NAME.fullmatch(entry.name)
        if match is None or match["host"] != _host() or _alive(int(match["pid"])):
            continue
        target = folder / match["name"]
        with suppress(OSError):  # another process may be doing the same
            if match["kind"] == "replaced" and not target.exists():
                entry.rename(target)
            elif entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


@lru_cache(maxsize=256)
def sweep_once(folder: Path) -> None:
    """`sweep`, the first time that this process writes into a folder."""
    if folder.is_dir():
        sweep(folder)


def _tag() -> str:
    return f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


@lru_cache(maxsize=1)
def _host() -> str:
    """Six digits of this machine: on a shared disk, the processes of others cannot be asked whether they live."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:6]


def _alive(pid: int) -> bool:
    """Whether a process runs; assumed where it cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
