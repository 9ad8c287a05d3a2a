"""Outputs appear whole or not at all, and replace nothing that pcs did not write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.config import expanded
from shared.io.failures import writing
from shared.io.foreign_files import foreign_files, mark
from shared.io.locks import hold
from shared.io.temporary_names import beside, exchanged, replaced, sweep, sweep_once
from shared.io.terminal import encodable, names

PathLike = str | os.PathLike[str]


def check_output(path: PathLike, overwrite: bool = False, inputs: Iterable[PathLike] = ()) -> Path:
    """The folder to write, as a path. To be called before work starts.

    Raises ValueError when it exists and holds something, unless `overwrite`; with `overwrite`, when it is a file or
    holds a file that pcs did not write, for it is replaced as a whole; when it holds the working or the home folder;
    when it is, holds or lies inside one of `inputs` (files and folders that are read); when a link on its way leads
    nowhere; when another process writes it (`shared.io.locks`); and when it cannot be written.
    """
    path = _named(path)
    check_apart(path, inputs)
    if path.exists():
        _check_there(path, overwrite)
    _writable(path)
    hold(path)
    return path


def check_file(path: PathLike, overwrite: bool = False) -> Path:
    """The file to write, as a path. ValueError when it exists, unless `overwrite`, when it is a folder, and when it cannot
    be written."""
    path = _named(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder, and a file is to be written: name a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: choose another output, or overwrite it explicitly")
    _writable(path)
    hold(path)
    return path


def _named(path: PathLike) -> Path:
    path = expanded(path)
    for link in (path, *path.parents):
        if link.is_symlink() and not link.exists():
            raise ValueError(
                f"the output {path} leads nowhere: {link} is a link to {os.readlink(link)}, which is not there (or leads "
                "back to it). Remove the link, or choose another output"
            )
    place, home, working = _place(path), Path.home().resolve(), Path.cwd().resolve()
    if not path.name or place in (home, *home.parents, working, *working.parents):
        raise ValueError(f"{str(path)!r} cannot be the output: name a folder or file of its own")
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the output {str(path)!r} is not UTF-8, and safetensors writes to no such path: choose another name"
        ) from None
    return path


def _place(path: PathLike) -> Path:
    """Where a path leads, its links followed; links in a circle are left as they are."""
    return Path(os.path.realpath(expanded(path)))


def check_apart(path: Path, inputs: Iterable[PathLike]) -> None:
    """ValueError when the output and something that is read share a place; links are followed."""
    place = _place(path)
    for item in inputs:
        source = _place(item)
        how = "is" if place == source else "holds" if place in source.parents else ""
        how = how or ("lies inside" if source in place.parents else "")
        if how:
            raise ValueError(f"the output {path} {how} {item}, which is read: choose an output apart from it")


def _check_there(path: Path, overwrite: bool) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} exists already and is a file, where a folder is to be written: choose another output")
    inside = sum(1 for _ in path.iterdir())
    if inside and not overwrite:
        raise ValueError(
            f"{path} exists already and holds {inside} file(s): choose another output, or overwrite it explicitly"
        )
    others = foreign_files(path) if overwrite else []
    if others:
        more = " …" if len(others) > 3 else ""
        raise ValueError(
            f"{path} cannot be overwritten: it holds what pcs did not write ({names(others[:3])}{more}), which would be "
            "deleted with it. Choose another output, or move those files away first"
        )


def _writable(path: Path) -> None:
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise ValueError(f"{path} cannot be written: {parent} is a file, not a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission in {parent}")


@contextmanager
def atomic_folder(path: PathLike, overwrite: bool = False, inputs: Iterable[PathLike] = ()) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it takes the name at the end, and vanishes on an error.

    With `overwrite`, what was there stays until the new folder is complete, and the two change places in one moment
    where the system can do that. A link that leads to a folder stays, and the folder is written where it leads. Files get the
    modes that the umask gives.
    What processes that were killed have left beside it is removed. ValueError as `check_output`, before and after.
    """
    named = check_output(path, overwrite, inputs)
    path = _place(named)
    with writing(named):
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
                _check_there(path, overwrite)  # again: somebody may have used the time
            _take_place(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _take_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    if exchanged(temporary, path):  # there is no moment without an output
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = replaced(path)
    path.rename(old)  # a kill here: whoever writes beside it next puts it back (`sweep`)
    try:
        temporary.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Yields a temporary path (same ending) to write to; it replaces `path` at the end, and vanishes on an error.

    The folder must exist; the file gets the mode that the umask gives, whoever wrote it.
    `with atomic_write(p) as temporary: save_file(tensors, temporary)`.
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
    """Write UTF-8 text, whole or not at all; the folder must exist. What UTF-8 cannot hold is escaped, as JSON does it."""
    with atomic_write(path) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8")
    return Path(path)
