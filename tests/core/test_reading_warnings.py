"""Tests the warnings about missing captions, missing masks and lossy crops, and the printing of untrusted text."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import shared.cli as cli
from shared.io.decode import read_picture
from shared.io.read_subject import read_subject
from shared.io.resize import resize
from shared.io.terminal import printable
from tests.core.scenes import save, scene


def photos(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir()
    for i, (width, height) in enumerate(sizes):
        save(folder / f"{i}.png", scene(width, height))
    return folder


def warned(folder: Path, **settings) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_subject(folder, **settings)
    return [str(w.message) for w in caught]


def test_a_warning_names_the_pictures_that_lack_a_caption_or_mask_if_other_pictures_have_one(tmp_path: Path) -> None:
    images = photos(tmp_path / "photos", (32, 32), (32, 32), (32, 32))
    assert warned(images) == []
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "1.txt").write_text("on a table")
    (images / "masks").mkdir()
    for name in ("0.png", "1.png"):
        Image.new("L", (32, 32), 255).save(images / "masks" / name)
    captions, masks = warned(images, captions=tmp_path / "words")
    assert captions.startswith("2 of 3 pictures have no caption: 0.png, 2.png; ")
    assert masks.startswith("1 of 3 pictures have no mask: 2.png; ")
    cut = Image.fromarray(scene(32, 32))
    cut.putalpha(Image.fromarray(np.eye(32, dtype=np.uint8) * 255))
    cut.save(images / "2.png")
    assert warned(images) == [], "the picture's transparency serves as its mask"
    (images / "2.txt").write_text("  ")
    (images / "0.txt").write_text("in the snow")
    assert warned(images)[0].startswith("2 of 3 pictures have no caption: 1.png, 2.png; "), (
        "an empty caption counts as missing"
    )


@pytest.mark.parametrize(("size", "lost"), [((800, 40), 95), ((90, 160), 44), ((40, 62), 35)])
def test_the_warning_about_a_lossy_crop_names_the_picture_and_the_remedy(tmp_path: Path, size, lost: int) -> None:
    picture = read_picture(save(tmp_path / "wide.png", scene(*size)))
    with pytest.warns(UserWarning, match=rf"wide\.png is {size[0]}x{size[1]}, and the crop loses {lost}% of it") as one:
        resize(picture, 32, "cover")
    assert "sources.references.fit=contain" in str(one[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resize(picture, 32, "contain")  # the remedy that the warning names
        resize(picture, 32)  # without a mode, a crop causes no warning
        resize(
            read_picture(save(tmp_path / "photo.png", scene(60, 40))), 32, "cover"
        )  # a 3:2 picture loses only a third


def test_a_crop_that_keeps_the_whole_mask_causes_no_warning(tmp_path: Path) -> None:
    for name, columns in (("inside", slice(150, 170)), ("cut", slice(50, 170))):
        image = Image.fromarray(scene(192, 64))
        alpha = np.zeros((64, 192), np.uint8)
        alpha[20:30, columns] = 255
        image.putalpha(Image.fromarray(alpha))
        image.save(tmp_path / f"{name}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resize(read_picture(tmp_path / "inside.png"), 32, "cover")
    with pytest.warns(UserWarning, match=r"cut\.png"):
        resize(read_picture(tmp_path / "cut.png"), 32, "cover")


# --- terminal output --------------------------------------------------------------------------------

HOSTILE = "mug\x1b[2J\x1b]0;owned\x07\x9b31m\r\x08\x00\u202egpj.exe\u2066 é 猫 🦆\nnext\tline\ud800"


def test_control_characters_are_removed() -> None:
    assert printable(HOSTILE) == "mug[2J]0;owned31mgpj.exe é 猫 🦆\nnext\tline"
    assert "\n" not in printable(HOSTILE, line=True) and "next line" in printable(HOSTILE, line=True)
    assert printable(3.5) == "3.5"


def test_errors_and_warnings_are_printed_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    for error in (ValueError(HOSTILE), OSError(HOSTILE)):

        def raises(error: Exception = error) -> None:
            raise error

        app = typer.Typer()
        app.command()(lambda: raises())
        assert cli.run(app, []) in (1, 2)
        err = capsys.readouterr().err
        assert err.startswith("pcs: mug[2J") and not set(err) & set("\x1b\x07\x9b\r\x00\u202e")
    cli._warn(UserWarning(HOSTILE), UserWarning, "", 0)
    err = capsys.readouterr().err
    assert err.startswith("warning: mug[2J") and "\x1b" not in err
    cli._warn(UserWarning(HOSTILE), UserWarning, "elsewhere", 3)
    assert capsys.readouterr().err == "", "the same warning is printed only once"


def test_an_error_about_a_hostile_concept_is_printed_without_control_characters(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "x.concept"
    folder.mkdir()
    (folder / "concept.json").write_text(json.dumps({"schema_version": 1, HOSTILE.replace("\ud800", ""): 1}))
    assert cli.run(cli.build(), ["concept", "show", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pcs: ") and not set(err) & set("\x1b\x07\x9b\r\x00\u202e")
