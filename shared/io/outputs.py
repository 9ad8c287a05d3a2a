"""Writes outputs atomically, and never replaces anything that pcs did not write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.config import expanded
from shared.io.failures import writing
from shared.io.foreign_files import foreign_files, mark
from shared.io.locks import hold, holding
from shared.io.temporary_names import beside, exchanged, replaced, sweep, sweep_once
from shared.io.terminal import encodable, names

PathLike = str | os.PathLike[str]


def check_output(path: PathLike, overwrite: bool = False, inputs: Iterable[PathLike] = ()) -> Path:
    """Checks that a folder can be written, and returns it as a path. Call this before any work starts.

    Raises ValueError if:
    - the path is a file
    - the folder is not empty and `overwrite` is not set
    - `overwrite`, which replaces the whole folder, is set and the folder contains a file that pcs did not write
    - the folder is the working or home folder, or contains one of them
    - the folder equals, contains or is inside one of `inputs` (files and folders that are read)
    - a link in the path is broken
    - another process is writing to the folder (`shared.io.locks`)
    - the folder cannot be written
    """
    path = _named(path)
    check_apart(path, inputs)
    if path.exists():
        _check_there(path, overwrite)
    _writable(path)
    hold(path)
    return path


def check_resumable(
    path: PathLike, kind: str, is_ours: Callable[[Path], bool], inputs: Iterable[PathLike] = ()
) -> Path:
    """Checks a folder for a command that continues the work of an earlier call, and returns it as a path.

    Call this before any work starts. Raises ValueError as `check_output` does, except that a folder with files is
    accepted if `is_ours` returns True for it; nothing in it will be deleted. `kind` names the contents of such a folder
    in the error message.
    """
    path = _named(path)
    check_apart(path, inputs)
    if path.exists() and not path.is_dir():
        _check_there(path, False)
    inside = sum(1 for _ in path.iterdir()) if path.exists() else 0
    if inside and not is_ours(path):
        raise ValueError(f"{path} already exists and contains {_files(inside)}, but no {kind}: choose another output")
    _writable(path)
    hold(path)
    return path


def check_file(path: PathLike, overwrite: bool = False, inputs: Iterable[PathLike] = ()) -> Path:
    """Checks that a file can be written, and returns it as a path. Call this before any work starts.

    Raises ValueError if the file exists (unless `overwrite` is set), is a folder, is or lies inside one of `inputs`, is
    being written by another process, or cannot be written.
    """
    path = _named(path)
    check_apart(path, inputs)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the path of a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} already exists: choose another output, or replace it with --overwrite")
    _writable(path)
    hold(path)
    return path


def _named(path: PathLike) -> Path:
    path = expanded(path)
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise ValueError(
                f"the output {path} leads nowhere: {link} is a link to {os.readlink(link)}, which does not exist (or "
                "the links form a loop). Remove the link, or choose another output"
            )
    place, home, working = _place(path), Path.home().resolve(), Path.cwd().resolve()
    if not path.name or place in (home, *home.parents, working, *working.parents):
        raise ValueError(f"{str(path)!r} cannot be the output: give a separate folder or file")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the output {str(path)!r} is not UTF-8, and safetensors cannot write to such a path: choose another name"
        ) from None
    return path


def _place(path: PathLike) -> Path:
    """Returns the absolute path with links resolved. Links that form a loop are left as they are."""
    return Path(os.path.realpath(expanded(path)))


def check_apart(path: Path, inputs: Iterable[PathLike]) -> None:
    """Raises ValueError if the output overlaps one of the inputs. Links are followed."""
    place = _place(path)
    for item in inputs:
        source = _place(item)
        how = "is" if place == source else "contains" if place in source.parents else ""
        how = how or ("lies inside" if source in place.parents else "")
        if how:
            raise ValueError(f"the output {path} {how} {item}, which is an input: choose another output")


def _check_there(path: Path, overwrite: bool) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} is an existing file, but the output must be a folder: choose another output")
    inside = sum(1 for _ in path.iterdir())
    if inside and not overwrite:
        raise ValueError(
            f"{path} already exists and contains {_files(inside)}: choose another output, or replace it with "
            "--overwrite"
        )
    others = foreign_files(path) if overwrite else []
    if others:
        more = " …" if len(others) > 3 else ""
        raise ValueError(
            f"{path} cannot be overwritten: it contains files that pcs did not write ({names(others[:3])}{more}), "
            "which would be deleted. Choose another output, or move those files elsewhere first"
        )


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _writable(path: Path) -> None:
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise ValueError(f"{path} cannot be written: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission in {parent}")


@contextmanager
def atomic_folder(path: PathLike, overwrite: bool = False, inputs: Iterable[PathLike] = ()) -> Iterator[Path]:
    """Yields a temporary folder next to `path`, which is renamed to `path` at the end, or removed if there is an error.

    With `overwrite`, the old folder stays until the new one is complete, and the two are then exchanged, atomically if
    the system supports this. If `path` is a link to a folder, the link stays and its target is written. Files get the
    permissions that the umask allows. Leftovers of killed processes next to `path` are removed. The output is locked.

    Raises ValueError as `check_output` does. Whether the output may be replaced is checked again at the end.
    """
    with holding(), writing(expanded(path)):
        path = _place(check_output(path, overwrite, inputs))
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        temporary = beside(path)
        temporary.mkdir()
        try:
            yield temporary
            mark(temporary)
            usual = temporary.stat().st_mode & 0o666
            for file in temporary.rglob("*"):
                if file.is_file() and not file.is_symlink():
                    file.chmod(usual)
            if path.exists():
                _check_there(path, overwrite)  # check again: the output may have appeared in the meantime
            take_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def take_place(temporary: Path, path: Path) -> None:
    """Renames a complete folder to `path`, in the same folder. An old `path` is exchanged for it, atomically if the system
    supports this, and then removed."""
    if not path.exists():
        temporary.rename(path)
        return
    if exchanged(temporary, path):  # a complete output exists at every moment
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = replaced(path)
    path.rename(old)  # if killed here, the next process that writes to this folder restores the old output (`sweep`)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` at the end, or is removed if there is an error.

    The folder must exist. The file gets the permissions that the umask allows, whichever library wrote it. The
    temporary path has a different extension, so a library that infers the format from it must be told the format.
    Example: `with atomic_write(p) as temporary: save_file(tensors, temporary)`.
    """
    named, path = path, Path(os.path.realpath(path))
    sweep_once(path.parent)
    temporary = beside(path)
    with writing(named):
        try:
            temporary.touch()
            usual = temporary.stat().st_mode & 0o666
            temporary.unlink()
            yield temporary
            temporary.chmod(usual)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: PathLike, text: str) -> Path:
    """Writes UTF-8 text atomically; the folder must exist. Characters that UTF-8 cannot encode are escaped, as in JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8")
    return Path(path)
