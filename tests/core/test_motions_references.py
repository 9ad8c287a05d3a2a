"""Commands write held-out motions as folders of clips, and any of the toybox's motions as a sheet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.cli import build, run
from shared.io.contact_sheets import read_metadata
from shared.io.decode import read_picture
from shared.toybox.motions.clip_captions import plain_clip_caption
from shared.toybox.motions.clips import draw_clip
from shared.toybox.motions.reference_clips import KEY, reference_moving
from shared.toybox.reference_sets import held_out


def toybox(*arguments: object) -> int:
    return run(build(), ["toybox", *map(str, arguments)])


def test_a_motion_is_written_as_a_folder_of_clips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, out = "development-zigzag", tmp_path / "zigzag"
    assert toybox("subjects", name, "--out", out, "--num", 3, "--frames", 4) == 0
    assert capsys.readouterr().out.split() == [f"{out}/{i:02d}" for i in range(3)]
    moving = reference_moving(name, 3, 0, 4)
    for i, scene in enumerate(moving):
        folder, drawn = out / f"{i:02d}", draw_clip(scene)
        files = [f"{k:03d}.png" for k in range(4)]
        assert sorted(p.name for p in folder.iterdir()) == [*files, "caption.txt"]
        for k, file in enumerate(files):
            assert read_metadata(folder / file) == {KEY: name}
            read = read_picture(folder / file).pixels / 2 + 0.5
            assert (read.permute(1, 2, 0) - drawn.frames[k]).abs().max() < 0.01
            mask = read_picture(out / "masks" / f"{i:02d}" / file).pixels[0] / 2 + 0.5
            assert torch.allclose(mask, drawn.mask[k], atol=1 / 255)
        assert (folder / "caption.txt").read_text("utf-8") == plain_clip_caption(scene) + "\n"


def test_the_clips_share_only_the_motion() -> None:
    moving = reference_moving("reporting-lap", 8, 1)
    assert len({m.scene.things[0].class_name for m in moving}) == len({m.scene.background for m in moving}) == 8
    assert all(m.scene.things[0].pattern_seed is None and m.scene.style == "photo" for m in moving)
    assert len({len(m.path) for m in moving}) == 1 and len(moving[0].path) == 16
    other = reference_moving("reporting-lap", 8, 2)
    assert [m.scene for m in moving] != [m.scene for m in other]
    assert [m.scene for m in moving] == [m.scene for m in reference_moving("reporting-lap", 8, 1)]


def test_a_held_out_thing_can_perform_the_motion_in_all_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    duck, asked = "development-duck", ("--num", 2, "--thing")
    assert toybox("subjects", "development-zigzag", "--out", tmp_path / "a", "--frames", 2, *asked, duck) == 0
    moving = reference_moving("development-zigzag", 2, 0, 2, held_out(duck).thing)
    for i, scene in enumerate(moving):
        assert scene.scene.things == (held_out(duck).thing,)
        read = read_picture(tmp_path / "a" / f"{i:02d}" / "001.png").pixels / 2 + 0.5
        assert (read.permute(1, 2, 0) - draw_clip(scene).frames[1]).abs().max() < 0.01
    assert moving[0].scene.background != moving[1].scene.background
    for name, thing, why in (
        ("development-zigzag", "development-dcuk", "Did you mean 'development-duck'?"),
        ("development-duck", "development-mug", "--thing development-mug does not apply to development-duck"),
    ):
        assert toybox("subjects", name, "--out", tmp_path / "b", *asked, thing) == 2
        assert why in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_impossible_requests_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = (
        (("subjects", "development-zigzig", "--out", tmp_path / "a"), "Did you mean 'development-zigzag'?"),
        (("subjects", "development-mug", "--frames", 8, "--out", tmp_path / "a"), "only motions are written as clips"),
        (("subjects", "development-spiral", "--frames", 65, "--out", tmp_path / "a"), "less than or equal to 64"),
        (("motions", tmp_path / "a.txt"), "must end in .png"),
        (("motions", tmp_path / "a.png", "--name", "hover"), "toybox motion"),
    )
    for arguments, message in wrong:
        assert toybox(*arguments) == 2
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_has_a_row_for_each_clip(tmp_path: Path) -> None:
    sheet = ("--columns", 3, "--frames", 4, "--rows", 2)
    assert toybox("motions", tmp_path / "a.png", "--name", "spin", "--name", "reporting-lunge", *sheet) == 0
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape[0] > 4 * 128 and 3 * 128 < picture.shape[1] < 3 * 128 + 200
