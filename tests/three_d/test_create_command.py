"""The command `pcs 3d create` writes an asset, and continues, keeps or replaces one that was begun."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import trimesh

from pcs_3d.assets import ABOUT
from shared.commands.progress import Bar
from shared.train import checkpoint
from tests.three_d.pages import viewer_of
from tests.three_d.test_assets import FIELDS, TINY


@pytest.fixture
def asked(make_tiny_sd, tmp_path: Path) -> tuple[str, ...]:
    """Returns the arguments of a command that makes a tiny asset as `asset` in the temporary folder."""
    make_tiny_sd().save_pretrained(tmp_path / "sd")
    settings = [s for s in TINY if not s.startswith(("backbone=", "train.steps="))]
    settings += [f"backbone={tmp_path / 'sd'}", "field.kind=voxels", *FIELDS["voxels"], "train.steps=3"]
    return "3d", "create", "dreamfusion", *settings, "--out", str(tmp_path / "asset")


def test_the_command_writes_an_asset_which_can_be_interrupted_continued_and_replaced(pcs, asked, tmp_path, monkeypatch):
    out, shown = tmp_path / "asset", Bar.step

    def stopped(self: Bar, phase, record, total) -> None:
        shown(self, phase, record, total)
        if record.step == 2:
            os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C

    with monkeypatch.context() as patched:
        patched.setattr(Bar, "step", stopped)
        ran = pcs(*asked)
    assert ran.code == 130 and f"progress is saved in {out}.training; continue with --resume" in ran.err
    state = checkpoint.load(tmp_path / "asset.training")
    assert state is not None and state.step == 2 and not out.exists()
    ran = pcs(*asked)
    assert ran.code == 2 and "holds an interrupted run: continue it with --resume, or start over" in ran.err

    ran = pcs(*asked, "--resume")
    assert ran.code == 0 and f"{out}: open {out / 'report.html'}" in ran.out, ran.err
    glb, obj = (trimesh.load(out / f"asset.{kind}", force="mesh", process=False) for kind in ("glb", "obj"))
    about = json.loads((out / ABOUT).read_text())
    assert len(glb.faces) == len(obj.faces) == about["mesh"]["faces"] > 20
    assert glb.visual.material.baseColorTexture is not None and obj.visual.material.image is not None
    assert len(viewer_of((out / "report.html").read_text())[1].faces) == len(glb.faces)
    assert checkpoint.load(tmp_path / "asset.training") is None

    made = (out / ABOUT).stat().st_mtime_ns
    ran = pcs(*asked, "--resume")
    assert ran.code == 0 and ran.out == f"already finished: {out}\n"
    ran = pcs(*asked)
    assert ran.code == 2 and f"{out} already exists" in ran.err and (out / ABOUT).stat().st_mtime_ns == made

    ran = pcs(*asked, "--overwrite", "--vram", "64G", "train.steps=1")
    assert ran.code == 0, ran.err
    plan, *_, used, _ = ran.out.splitlines()
    found = re.fullmatch(r"memory: about (.*) of 64.0 GiB \(of main memory, for the whole process\): one view", plan)
    assert found and re.fullmatch(rf"memory: \S+ [MG]iB at peak \({found[1]} estimated\)", used)
    again = json.loads((out / ABOUT).read_text())
    assert again["recipe"]["train"]["steps"] == 1 and again["costs"]["memory_budget"] == 64 * 2**30
    refused = pcs(*asked, "--overwrite", "--vram", "1M")
    assert refused.code == 2 and "--vram 1.0 MiB is not enough" in refused.err
    assert json.loads((out / ABOUT).read_text()) == again, "the finished asset is kept"
