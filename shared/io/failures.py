"""Explains failures that are due to the machine (memory, disk, symbolic links, recursion depth) and not to the input.

A message states what happened, where, and what to do. Libraries report such failures with their own exceptions, and
only this module recognizes them.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OF_WRITING = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS, errno.EIO)
_OF_FILES = (errno.EMFILE, errno.ENFILE)  # too many files are open, in this process or on the whole machine
_FREE = "free some space or choose another output"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: {_FREE}",
    errno.EDQUOT: f"your disk quota is used up: {_FREE}",
    errno.EFBIG: "this exceeds the limit on file sizes: raise the limit (`ulimit -f unlimited`) or choose another disk",
    errno.EROFS: "this disk is read-only: choose another output",
    errno.EIO: "the disk has errors: choose another one",
    errno.ELOOP: "its symbolic links form a loop: remove one of them, or choose another location",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "too many files are open: raise the limit (`ulimit -n 4096`)",
    errno.ENFILE: "too many files are open: close other programs",
    errno.EACCES: "you have no permission to read or write there: change the permissions, or choose another location",
}
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory|bad_alloc|ALLOC_FAILED",
    re.IGNORECASE,
)
_SMALLER = (
    "choose a smaller batch (train.batch_size, --num), a lower resolution, a smaller model, or bf16 on a GPU "
    "(train.mixed_precision, --precision), or close other programs that use memory"
)


def system_error(error: BaseException) -> int | None:
    """Returns a failure's `errno`, even if it is only quoted in a library's message, or None if there is no `errno`."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _NUMBER.search(str(error)) if not isinstance(error, ValueError) else None
    if found:
        return int(found[1] or found[2])
    return errno.ELOOP if isinstance(error, RuntimeError) and "Symlink loop" in str(error) else None


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, PyTorch (on the CPU or a GPU) or a library that reads files ran out of memory, even if the
    library raised another exception because of that."""
    return any(map(_out_of_memory, _with_causes(error)))


def of_the_machine(error: BaseException) -> bool:
    """Whether memory, the disk or the number of open files is at fault, even if a library raised another exception
    because of that. If so, the user's input must not be reported as damaged."""
    return any(map(_of_the_machine, _with_causes(error)))


def may_be_intact(error: BaseException) -> bool:
    """Whether reading a file failed for a reason that does not concern its contents, such as a lack of permission."""
    return of_the_machine(error) or system_error(error) not in (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def of_the_disk(error: BaseException) -> bool:
    """Whether writing failed for a reason that would make any further output fail too."""
    return system_error(error) in _OF_WRITING


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if system_error(error) == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError) and _MEMORY.search(str(error)) is not None


def _of_the_machine(error: BaseException) -> bool:
    return _out_of_memory(error) or of_the_disk(error) or system_error(error) in _OF_FILES


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and the errors that led to it, as a traceback would list them."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def in_words(error: BaseException) -> str | None:
    """Returns a message that explains a failure of the machine, or None for any other error, which may be a bug."""
    error = next(filter(_of_the_machine, _with_causes(error)), error)
    if _out_of_memory(error):
        where = (
            "the GPU"
            if re.search(r"CUDA|CUBLAS|GPU", str(error)) or "cuda" in type(error).__module__
            else "this machine"
        )
        return f"out of memory: {where} does not have enough for this{_size(error)}. To continue, {_SMALLER}"
    if isinstance(error, RecursionError):
        return "something is nested too deeply to be read: look for deeply nested brackets in your settings and files"
    if isinstance(error, OverflowError) or (isinstance(error, RuntimeError) and "without overflow" in str(error)):
        return f"a number is too large ({error}): give a smaller one"
    number = system_error(error)
    if number is None:
        return None
    what = os.strerror(number)
    named = getattr(error, "filename", None)
    place = re.search(r"Symlink loop from (.+)", str(error))
    named = named if named is not None else place[1].strip("'\"") if place else None
    where = f"{os.fsdecode(named)}: {what}" if isinstance(named, str | bytes | os.PathLike) else what
    advice = _ADVICE.get(number)
    return f"{where}; {advice}" if advice else where


def _size(error: BaseException) -> str:
    """Returns text that states how much memory was requested, or "" if the error does not state it."""
    asked = re.search(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)", str(error))
    if asked is None:
        return ""
    return f" ({asked[2] or f'{int(asked[1]) / 2**30:.3g} GiB'} in a single allocation)"


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Re-raises disk errors from the enclosed block, whichever library raised them, so that they name `path` instead of
    the temporary file."""
    try:
        yield
    except Exception as error:
        number = system_error(error)
        if number is None or number not in _OF_WRITING:
            raise
        raise OSError(number, os.strerror(number), str(Path(path))) from error


@contextmanager
def reading(what: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an `OSError` from the enclosed block into a ValueError that names `what`, a file. Failures of the machine
    are re-raised, and name the file too."""
    try:
        yield
    except OSError as error:
        if not of_the_machine(error):
            raise ValueError(f"{what} cannot be read: {error.strerror or error}") from None
        if error.filename is None:
            error.filename = str(what)
        raise
