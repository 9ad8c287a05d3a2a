"""All packages and data files are shipped, all dependencies are pinned, and a Python that is too old is reported."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")  # in the standard library since Python 3.11
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PINS = [line for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if not line.startswith("#")]


def test_every_package_is_listed_by_name():
    tops = [p for p in ROOT.iterdir() if p.name in ("shared", "configs") or p.name.startswith("pcs_")]
    packages = [p.parent.relative_to(ROOT) for top in tops for p in top.rglob("__init__.py")]
    assert sorted(".".join(p.parts) for p in packages) == sorted(PROJECT["tool"]["setuptools"]["packages"])


def test_data_files_that_the_code_reads_are_shipped():
    globs = PROJECT["tool"]["setuptools"]["package-data"]
    shipped = {p for package, many in globs.items() for glob in many for p in (ROOT / package).glob(glob)}
    for data in ("configs/image/dreambooth_lora.yaml", "configs/overlays/toybox.yaml", "configs/prompts/toybox.yaml"):
        assert ROOT / data in shipped
    weights, templates = ROOT / "shared/toybox/weights", ROOT / "shared/metrics/templates"
    assert {p for folder in (weights, templates) for p in folder.rglob("*") if p.is_file()} <= shipped


def test_each_package_is_pinned_once_per_python_version():
    seen: dict[tuple[str, str], str] = {}
    for pin in PINS:
        match = re.fullmatch(r"([\w.-]+)==([\w.]+)(?: ; python_version (<|>=) \"3\.11\")?", pin)
        assert match, pin
        name, version, when = match.groups()
        for python in {"<": ["3.10"], ">=": ["3.11"]}.get(when, ["3.10", "3.11"]):
            assert (name.lower(), python) not in seen, f"{name} is pinned twice for {python}"
            seen[name.lower(), python] = version


@pytest.mark.parametrize("python", ["3.10", "3.11"])
def test_every_dependency_is_pinned_within_its_range(python):
    from packaging.requirements import Requirement
    from packaging.version import Version

    pins = {}
    for requirement in map(Requirement, PINS):
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            pins[requirement.name.lower()] = Version(next(iter(requirement.specifier)).version)
    extras = PROJECT["project"]["optional-dependencies"].values()
    named = [*PROJECT["project"]["dependencies"], *(name for extra in extras for name in extra)]
    for requirement in map(Requirement, named):
        assert pins[requirement.name.lower()] in requirement.specifier, f"{requirement} on Python {python}"


def test_make_reports_a_python_that_is_too_old(tmp_path):
    old = tmp_path / "python3.9"
    old.write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])' \"$2\"\n"
    )
    old.chmod(0o755)
    made = tmp_path / "venv"
    run = subprocess.run(
        ["make", "-C", str(ROOT), "install", f"PYTHON={old}", f"VENV={made}"], capture_output=True, text=True
    )
    assert run.returncode != 0 and not made.exists()
    assert f"{old} is Python 3.9, and 3.10 or newer is needed: make PYTHON=python3.11" in run.stderr


def test_contributing_lists_the_layers_that_the_import_linter_checks():
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Layers")[2].partition("\n## ")[0]
    _, core, _, assets, _ = page.split("```")
    for package, block in (("shared", core), ("pcs_3d", assets)):
        (layers,) = [c["layers"] for c in contracts if c.get("containers") == [package]]
        rows = re.findall(rf"^{package}\.(\S+(?:, \S+)*)  +(.*)$", block, re.MULTILINE)
        printed = [about.split() if names == "<parts>" else names.split(", ") for names, about in rows]
        assert [sorted(row) for row in printed] == [sorted(layer.split(" | ")) for layer in layers], package


def test_shipped_recipes_are_found_from_a_folder_that_has_its_own_configs(tmp_path):
    """threestudio's checkout has such a folder, and starts the suite with itself first on the path."""
    (tmp_path / "configs").mkdir()
    code = "from shared.recipe.catalog import recipe_files; print('dreamfusion' in recipe_files('3d'))"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
