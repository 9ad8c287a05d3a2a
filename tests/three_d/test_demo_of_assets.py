"""The asset part of the demo turns a toybox subject into a mesh and a turntable clip."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pcs_3d import demo
from shared.demo import Asked, Bars, Exhibit
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow

QUICK = """
base: hifa
field: {resolution: 12}
train: {steps: 1, batch_size: 1}
export: {resolution: 24, picture: 32, frames: 8, texture: 64}
"""


def test_a_subject_becomes_a_mesh_and_a_turntable_clip(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(QUICK)
    recipe = str(tmp_path / "quick.yaml")
    asked = Asked(tmp_path, "development-robot", "t_lora", "development-zigzag", "motion_director", recipe)
    demo.check(asked)
    with pytest.raises(ValueError, match="--asset-recipe dreambooth3d itself learns the subject from its pictures"):
        demo.check(replace(asked, asset_recipe="dreambooth3d"))
    line, shown = demo.show(asked, Bars(nullcontext, nullcontext))
    assert isinstance(line, str) and "asset.glb" in line
    # nothing was learned, so the prompt names the class
    assert isinstance(shown, Exhibit) and "a photo of a robot" in shown.text
    assert all(file.is_file() for file in shown.more.values())
    turn = read_clip(shown.file, ClipWindow(length=24)).frames
    assert turn.shape[1] == 24
    first, half, last = (turn[:, i] for i in (0, 12, 23))
    assert (first - half).abs().mean() > (first - last).abs().mean()  # the last frame is one step short of a full turn
