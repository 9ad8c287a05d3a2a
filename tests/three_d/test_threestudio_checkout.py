"""Tests the files written into a threestudio checkout, the doctor's report, and launches with missing packages.

If `PCS_THREESTUDIO=DIR` is set, that checkout's launch.py also takes 20 steps with a concept.
"""

from __future__ import annotations

import csv
import math
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import yaml

from pcs_3d.threestudio import doctor
from pcs_3d.threestudio.checkout import WRITTEN, content, install
from pcs_3d.threestudio.stand_ins import REPLACEABLE, absent, stand_in, standing_in
from tests.three_d.threestudio_checkouts import CHECKOUT, CONTRACT, forget, write_concept

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """Makes a stand-in for a checkout from the contract's package and a launch.py that prints its arguments."""
    return Path(shutil.copytree(CONTRACT, tmp_path / "threestudio"))


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


# --- written files -------------------------------------------------------------------------


def test_install_writes_an_extension_and_a_configuration_only_once(checkout, pcs):
    before = listing(checkout)
    ran = pcs("3d", "threestudio", "install", checkout)
    assert ran.code == 0 and [Path(p) for p in ran.out.split()] == [checkout / name for name in WRITTEN]
    assert listing(checkout) - before == set(WRITTEN)
    assert "configs" in ran.out and "doctor" in ran.err
    assert pcs("3d", "threestudio", "install", checkout).out == "", "nothing is left to do"


def test_files_that_the_user_changed_or_wrote_are_not_silently_replaced(checkout, pcs):
    install(checkout)
    config = checkout / "configs/pcs-dreamfusion.yaml"
    config.write_text(config.read_text() + "# mine\n")
    (checkout / "custom/pcs/__init__.py").unlink()
    ran = pcs("3d", "threestudio", "install", checkout)
    assert ran.code == 2 and "--overwrite" in ran.err and "# mine" in config.read_text()
    assert not (checkout / "custom/pcs/__init__.py").exists(), "either all files are written or none are"
    assert pcs("3d", "threestudio", "install", checkout, "--overwrite").code == 0
    assert config.read_text() == content("configs/pcs-dreamfusion.yaml")
    (checkout / "custom/pcs/__init__.py").write_text("print('another extension')")
    ran = pcs("3d", "threestudio", "install", checkout, "--overwrite")
    assert ran.code == 2 and "not written by this program" in ran.err


@pytest.mark.parametrize("name", ["custom/pcs", "custom/pcs/__init__.py"])
def test_a_link_that_leads_nowhere_is_refused_and_its_target_is_not_created(checkout, pcs, tmp_path, name):
    (checkout / name).parent.mkdir(parents=True, exist_ok=True)
    (checkout / name).symlink_to(tmp_path / "unplugged")
    ran = pcs("3d", "threestudio", "install", checkout)
    assert ran.code == 2 and f"leads nowhere: {checkout / name} is a link to {tmp_path / 'unplugged'}" in ran.err
    assert not (checkout / "configs/pcs-dreamfusion.yaml").exists() and not (tmp_path / "unplugged").exists()


@pytest.mark.parametrize("command", ["install", "doctor", "run"])
def test_a_folder_that_is_not_a_checkout_is_refused(tmp_path, pcs, command):
    ran = pcs("3d", "threestudio", command, tmp_path)
    assert ran.code == 2 and "launch.py" in ran.err and not listing(tmp_path)


def test_the_extension_accepts_every_key_in_the_configuration(checkout, monkeypatch):
    from importlib import import_module

    forget()
    monkeypatch.syspath_prepend(str(checkout))
    extension = import_module("pcs_3d.threestudio.extension")
    registry = import_module("threestudio").__modules__
    assert set(registry) == set(extension.NAMES)
    system = yaml.safe_load(content("configs/pcs-dreamfusion.yaml"))["system"]
    ours = {k.removesuffix("_type") for k, v in system.items() if str(v).startswith("pcs-")}
    assert ours == {"renderer", "prompt_processor", "guidance", "exporter"}
    for part in ours:
        registry[system[f"{part}_type"]].Config(**system[part])
    forget()


# --- the doctor ------------------------------------------------------------------------------


def test_the_doctor_states_how_to_install_a_missing_extension(checkout, pcs):
    ran = pcs("3d", "threestudio", "doctor", checkout)
    assert ran.code == 1 and "threestudio 0.0.contract" in ran.out
    assert f"custom/pcs/__init__.py is missing: pcs 3d threestudio install {checkout}" in ran.out
    for package in absent():
        assert f"{package} is not installed ({REPLACEABLE[package]})" in ran.out


def test_missing_packages_are_named_and_no_import_is_attempted_without_them(checkout, monkeypatch):
    install(checkout)
    monkeypatch.setitem(doctor.NEEDED, "no_such_module", "no-such-package")
    found = list(doctor.findings(checkout))
    (bad,) = [what for works, what in found if works is False and "no-such-package" in what]
    assert bad.startswith("packages are missing: pip install") and not any("imports" in what for _, what in found)


def test_the_doctor_checks_what_the_extension_registers(checkout, monkeypatch):
    install(checkout)
    monkeypatch.setattr(doctor, "NEEDED", {})
    found = list(doctor.findings(checkout))
    assert all(works is not False for works, _ in found), found
    lines = [what for works, what in found if works]
    assert any("registers 0 classes" in line for line in lines)
    assert "registered: pcs-exporter, pcs-guidance, pcs-prompt-processor, pcs-volume-renderer" in lines
    (checkout / "custom/pcs/__init__.py").write_text("import no_such_extension")
    found = [what for works, what in doctor.findings(checkout) if works is False]
    assert any("differs" in what for what in found) and any("no_such_extension" in what for what in found)
    (checkout / "threestudio/__init__.py").write_text("import no_such_package")
    found = [what for works, what in doctor.findings(checkout) if works is False]
    assert any("cannot be imported" in what and "no_such_package" in what for what in found)
    (checkout / "threestudio/__init__.py").write_text("raise ModuleNotFoundError(name='pkg_resources')")
    found = [what for works, what in doctor.findings(checkout) if works is False]
    assert any("cannot be imported" in what and 'pip install "setuptools<81"' in what for what in found)


# --- missing packages ------------------------------------------------------------------------


def asked_by(name: str, source: str) -> dict:
    """Executes source code in a module with this name and returns the module's namespace."""
    scope = {"__name__": name}
    exec(source, scope)
    return scope


STATEMENTS = """
import nowhere
import nowhere.torch as dr
from nowhere import Grid, ops
from nowhere.ops import area
class Mine(Grid): pass
from typing import Union
Both = Union[dr.Context, ops.Other]
"""


def test_only_threestudio_sees_stand_ins_which_report_the_missing_package():
    with standing_in(["nowhere"]):
        made = asked_by("threestudio.models.x", STATEMENTS)
        asked_by("extern.y", STATEMENTS)
        for other in ("transformers.utils", "pcs_3d.x", "__main__"):
            with pytest.raises(ModuleNotFoundError):
                asked_by(other, "import nowhere")
        assert find_spec("nowhere") is None and "nowhere" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        asked_by("threestudio.models.x", "import nowhere")
    assert get_args(made["Both"]) == (made["dr"].Context, made["ops"].Other)
    for call in (made["dr"].Context, made["area"], made["Mine"], made["nowhere"].anything.at_all):
        with pytest.raises(ImportError, match="not installed"):
            call(1, size=2)
    with pytest.raises(ImportError, match="hash grids; needs CUDA"):
        stand_in("tinycudann").Encoding(3, {})
    assert not hasattr(made["nowhere"], "__path__") and stand_in("tinycudann").free_temporary_memory() is None


def test_a_launch_without_a_gpu_requires_the_cpu_option(checkout, pcs, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = pcs("3d", "threestudio", "run", checkout, "--config", "x.yaml", "--train")
    assert ran.code == 2 and "--cpu" in ran.err


# --- a real checkout -------------------------------------------------------------------------


@pytest.fixture
def real(tmp_path) -> Path:
    """Makes a folder with links to the given checkout's code, so that the checkout itself is not changed."""
    if not CHECKOUT:
        pytest.skip("no threestudio checkout: set PCS_THREESTUDIO=DIR, and run with its packages installed")
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("launch.py", "threestudio", "extern", "load"):
        (folder / name).symlink_to(Path(CHECKOUT).resolve() / name)
    (folder / "custom").mkdir()
    return folder


def started(*arguments: object) -> str:
    """Runs `pcs 3d threestudio …` in a separate process and returns its output."""
    command = [sys.executable, "-W", "ignore", "-m", "shared.cli", "3d", "threestudio", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran.stdout + ran.stderr


def test_a_checkouts_launch_py_takes_20_steps_with_a_concept_and_exports_an_asset(real, sd, make_tiny_sd, tmp_path):
    make_tiny_sd().save_pretrained(tmp_path / "tiny")
    concept = write_concept(sd, tmp_path / "my-mug.concept")
    started("install", real)
    said = started("doctor", real)
    assert "registered: pcs-exporter, pcs-guidance, pcs-prompt-processor, pcs-volume-renderer" in said
    assert "BROKEN" not in said
    settings = (
        "system.prompt_processor.prompt=a photo of a <my-mug>", f"system.guidance.backbone={tmp_path / 'tiny'}",
        f"system.guidance.concepts={{{concept}: 0.8}}", "system.guidance.settings=[guidance.scale=5]",
        "data.width=32", "data.height=32", "data.batch_size=2", "data.eval_width=16", "data.eval_height=16",
        "data.n_test_views=2", "system.renderer.samples=16", "system.exporter.resolution=24",
        "system.exporter.texture=64", "trainer.max_steps=20", "use_timestamp=false", f"exp_root_dir={tmp_path / 'out'}",
    )  # fmt: skip
    run = ("run", real, "--cpu", "--config", "configs/pcs-dreamfusion.yaml")
    log = started(*run, "--train", *settings)
    assert "max_steps=20" in log
    trial = tmp_path / "out/pcs-dreamfusion/pcs"
    with next(trial.glob("csv_logs/**/metrics.csv")).open() as file:
        losses = [float(row["train/loss_sds"]) for row in csv.DictReader(file) if row.get("train/loss_sds")]
    assert len(losses) == 20 and all(math.isfinite(x) and x > 0 for x in losses)
    assert (trial / "save/it20-test.mp4").is_file()
    started(*run, "--export", *settings, f"resume={trial / 'ckpts/last.ckpt'}")
    assert (trial / "save/it20-export/asset.glb").stat().st_size > 1000
