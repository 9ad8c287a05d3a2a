"""Checks which parts of a threestudio checkout work on this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from pcs_3d.threestudio.checkout import WRITTEN, check_checkout, differing, version_of
from pcs_3d.threestudio.stand_ins import NEEDED, REPLACEABLE, absent

_PATIENCE = 600  # time limit for the import, in seconds; generous, because cold disks are slow
#: Whether a check passed, and a description. The first is None if the check failed but nothing needs to be fixed.
Finding = tuple[bool | None, str]


def findings(folder: Path) -> Iterator[Finding]:
    """Checks a checkout and yields the findings, including how to fix what does not work. Raises ValueError if the
    folder is not a checkout."""
    folder = check_checkout(folder)
    yield True, f"{folder}: threestudio {version_of(folder) or 'of unknown version'}"
    wrong, installing = differing(folder), f"pcs 3d threestudio install {shlex.quote(str(folder))}"
    for name in WRITTEN:
        if name not in wrong:
            yield True, f"{name} is up to date"
        elif not wrong[name]:
            yield False, f"{name} is missing: {installing}"
        else:
            theirs = name.endswith(".yaml")  # users are meant to edit the configuration
            yield (
                (None if theirs else False),
                (f"{name} differs from what this program writes: {installing} --overwrite"),
            )
    missing = [module for module in NEEDED if find_spec(module) is None]
    if missing:
        yield False, f"packages are missing: pip install {' '.join(NEEDED[m] for m in missing)}"
    gone = absent()
    for package, purpose in REPLACEABLE.items():
        missing_part = (None, f"{package} is not installed ({purpose})")
        yield missing_part if package in gone else (True, f"{package} is installed")
    if not missing:
        yield from _tried(folder)
    yield _how_to_start(folder, gone)


def _tried(folder: Path) -> Iterator[Finding]:
    """Imports threestudio and the extension in a separate process, and yields the findings."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-W", "ignore", "-m", "pcs_3d.threestudio.probe", str(folder)]
    try:
        ran = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=_PATIENCE
        )
    except subprocess.TimeoutExpired:
        yield False, f"importing threestudio took more than {_PATIENCE} seconds"
        return
    last = ran.stdout.strip().splitlines()[-1:] or ["{}"]
    try:
        found = json.loads(last[0])
    except ValueError:
        found = {}
    if "classes" not in found:
        why = found.get("error") or (ran.stderr.strip().splitlines() or ["it stopped without an error message"])[-1]
        yield False, f"threestudio cannot be imported: {why}"
        return
    yield True, f"threestudio can be imported and registers {found['classes']} classes"
    if found.get("error"):
        yield False, f"custom/pcs cannot be imported: {found['error']}"
    elif found["ours"]:
        yield True, f"registered: {', '.join(found['ours'])}"


def _how_to_start(folder: Path, gone: list[str]) -> Finding:
    gpu = torch.cuda.is_available()
    if gpu and not gone:
        return True, "start threestudio as usual: python launch.py --config configs/pcs-dreamfusion.yaml --train"
    why = " and ".join(["packages are missing"] * bool(gone) + ["there is no GPU"] * (not gpu))
    cpu = "" if gpu else " --cpu"
    return None, (
        f"{why}, so launch.py cannot be started directly; use: pcs 3d threestudio run {shlex.quote(str(folder))}{cpu} "
        "--config configs/pcs-dreamfusion.yaml --train. Parts that need a missing package (hash grids, rasterizers, …) "
        "then raise an error only when they are used"
    )
