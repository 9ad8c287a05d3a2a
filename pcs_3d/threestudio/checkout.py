"""Finds a threestudio checkout and writes files into it."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from shared.config import expanded
from shared.io.outputs import atomic_write, check_file

#: Maps each written file's path in the checkout to the file in this package that is copied there.
WRITTEN = {"custom/pcs/__init__.py": "custom_pcs.py.txt", "configs/pcs-dreamfusion.yaml": "pcs-dreamfusion.yaml"}
_OURS = "pcs 3d threestudio install"  # occurs in the first lines of each written file


def check_checkout(folder: Path) -> Path:
    """Returns the folder's absolute path. Raises ValueError if it is not a threestudio checkout."""
    folder = expanded(folder).resolve()
    for name in ("launch.py", "threestudio/__init__.py", "custom"):
        if not (folder / name).exists():
            raise ValueError(
                f"{folder} is not a threestudio checkout, because it has no {name}: "
                "git clone https://github.com/threestudio-project/threestudio"
            )
    return folder


def version_of(folder: Path) -> str:
    """Returns the version stated in threestudio's sources, or "" if there is none."""
    found = re.search(r'^__version__ = "([^"]*)"', (folder / "threestudio/__init__.py").read_text("utf-8"), re.M)
    return found[1] if found else ""


def content(name: str) -> str:
    """Returns the contents of a file in `WRITTEN`."""
    return (files("pcs_3d.threestudio") / WRITTEN[name]).read_text(encoding="utf-8")


def differing(folder: Path) -> dict[str, bool]:
    """Returns the files that are missing or differ from what `install` writes, as a mapping from each file's path in
    the checkout to whether that path exists."""
    places = {name: folder / name for name in WRITTEN}
    return {
        n: p.exists() for n, p in places.items() if not p.is_file() or p.read_text("utf-8", "replace") != content(n)
    }


def install(folder: Path, overwrite: bool = False) -> list[Path]:
    """Writes the extension and a configuration. Returns the written files.

    Raises ValueError, before anything is written, if:
    - the folder is not a threestudio checkout
    - a file that was not written by this program exists at one of the paths
    - a file that was written by this program has been changed, and `overwrite` is not set
    """
    folder = check_checkout(folder)
    wanted = differing(folder)
    for name in [n for n, there in wanted.items() if there]:
        ours = (folder / name).is_file() and _OURS in (folder / name).read_text("utf-8", "replace")
        if not ours:
            raise ValueError(f"{folder / name} exists and was not written by this program: move it elsewhere first")
        if not overwrite:
            raise ValueError(f"{folder / name} differs from what would be written: use --overwrite to replace it")
    for name in wanted:
        check_file(folder / name, overwrite=True)
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content(name), encoding="utf-8")
    return [folder / name for name in wanted]
