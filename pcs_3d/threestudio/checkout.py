"""A threestudio checkout, and the files written into it."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from shared.config import expanded
from shared.io.outputs import atomic_write, check_file

#: Written files: path in the checkout -> the file of this package that is copied there.
WRITTEN = {"custom/pcs/__init__.py": "custom_pcs.py.txt", "configs/pcs-dreamfusion.yaml": "pcs-dreamfusion.yaml"}
_OURS = "pcs 3d threestudio install"  # in the first lines of each written file


def check_checkout(folder: Path) -> Path:
    """The folder, absolute. Raises ValueError if it is not a threestudio checkout."""
    folder = expanded(folder).resolve()
    for name in ("launch.py", "threestudio/__init__.py", "custom"):
        if not (folder / name).exists():
            raise ValueError(
                f"{folder} is not a threestudio checkout: it has no {name}. "
                "git clone https://github.com/threestudio-project/threestudio"
            )
    return folder


def version_of(folder: Path) -> str:
    """threestudio's version, from its sources; "" if they have none."""
    found = re.search(r'^__version__ = "([^"]*)"', (folder / "threestudio/__init__.py").read_text("utf-8"), re.M)
    return found[1] if found else ""


def content(name: str) -> str:
    """The content of a file in `WRITTEN`."""
    return (files("pcs_3d.threestudio") / WRITTEN[name]).read_text(encoding="utf-8")


def differing(folder: Path) -> dict[str, bool]:
    """The files that are missing or differ from what `install` writes -> whether something is in their place."""
    places = {name: folder / name for name in WRITTEN}
    return {
        n: p.exists() for n, p in places.items() if not p.is_file() or p.read_text("utf-8", "replace") != content(n)
    }


def install(folder: Path, overwrite: bool = False) -> list[Path]:
    """Writes the extension and a configuration; returns the written files. Raises ValueError, before anything is written, for
    a folder that is not a checkout and for files that were changed or are not ours."""
    folder = check_checkout(folder)
    wanted = differing(folder)
    for name in [n for n, there in wanted.items() if there]:
        ours = (folder / name).is_file() and _OURS in (folder / name).read_text("utf-8", "replace")
        if not ours:
            raise ValueError(f"{folder / name} already exists and was not written by this program: move it away")
        if not overwrite:
            raise ValueError(f"{folder / name} differs from what would be written: give --overwrite to replace it")
    for name in wanted:
        check_file(folder / name, overwrite=True)
    for name in wanted:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as temporary:
            temporary.write_text(content(name), encoding="utf-8")
    return [folder / name for name in wanted]
