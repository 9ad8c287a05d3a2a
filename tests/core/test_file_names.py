"""Every file name that the file system allows can be read, matched with captions and masks, printed and recorded."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from shared.io.contact_sheets import read_metadata, write_picture
from shared.io.outputs import check_output, write_text
from shared.io.read_subject import read_subject
from shared.io.terminal import escaped_name
from shared.sources.to_example import load
from tests.core.scenes import save, scene

#: Names that occur in practice: from macOS screenshots, Japanese input and web pages, and with emoji or old encodings.
NAMES = (
    "Screenshot 2024-05-01 at 9.41.00\u202fAM",
    "写真\u3000一",
    "my\u00a0photo",
    "👩\u200d🚀",
    "a\\b",
    "caf\udce9",
    "tab\tand\nline",
    "cats #1",
)


@pytest.mark.parametrize("name", NAMES)
def test_an_escaped_name_is_printable_and_can_be_decoded(name: str) -> None:
    escaped = escaped_name(name)
    assert escaped.isprintable() and "/" not in escaped
    escaped.encode("utf-8")
    assert codecs.decode(escaped.encode("ascii", "backslashreplace").decode(), "unicode_escape") == name


def test_escaping_leaves_plain_names_unchanged_and_keeps_names_distinct() -> None:
    assert escaped_name("写真 naïve 🚀.png") == "写真 naïve 🚀.png"
    assert escaped_name("a\u00a0b") == "a\\u00a0b" != escaped_name("a\\u00a0b")
    assert escaped_name("\U000e0041/") == "\\U000e0041\\u002f"


@pytest.mark.parametrize("name", NAMES)
def test_captions_and_masks_are_found_for_any_name(tmp_path: Path, name: str) -> None:
    images = tmp_path / name
    (images / "masks").mkdir(parents=True)
    for folder in ("captions", "other masks"):
        (tmp_path / folder).mkdir()
    save(images / f"{name}.png", scene(32, 32))
    for folder in (images / "masks", tmp_path / "other masks"):
        Image.new("L", (32, 32), 255).save(folder / f"{name}.png")
    for folder in (images, tmp_path / "captions"):
        (folder / f"{name}.txt").write_text("on a table")
    for beside in ({}, {"captions": tmp_path / "captions", "masks": tmp_path / "other masks"}):
        subject = read_subject(images, **beside)
        (picture,) = subject.images
        assert picture.name == f"{name}.png" and subject.captions[picture] == "on a table"
        assert subject.masks[picture].name == f"{name}.png" and load(picture, subject.masks[picture]).size == (32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_any_prompt_can_be_recorded_in_a_png(tmp_path: Path, name: str) -> None:
    write_picture(torch.zeros(3, 16, 16), tmp_path / f"{name}.png", {"Description": f"a {name}"})
    description = read_metadata(tmp_path / f"{name}.png")["Description"]
    assert description == f"a {name}".encode(errors="backslashreplace").decode()


def test_an_output_path_that_safetensors_cannot_write_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not UTF-8, and safetensors cannot write to such a path"):
        check_output(tmp_path / "caf\udce9" / "mug.concept")


def test_json_that_is_not_valid_utf8_survives_a_round_trip(tmp_path: Path) -> None:
    text = json.dumps({"file": "caf\udce9 写"}, ensure_ascii=False)
    assert json.loads(write_text(tmp_path / "a.json", text).read_text(encoding="utf-8")) == {"file": "caf\udce9 写"}
