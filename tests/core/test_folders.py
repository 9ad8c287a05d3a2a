"""Pictures can be resized, found in folders together with their captions and masks, and written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared.io.contact_sheets import contact_sheet, grid, read_metadata, to_image, write_picture
from shared.io.decode import read_picture
from shared.io.find_pictures import list_pictures
from shared.io.read_subject import read_subject
from shared.io.resize import resize
from tests.core.scenes import levels, save, scene

# --- resizing -------------------------------------------------------------------------------


def test_cover_crops_to_the_middle_or_around_the_mask(tmp_path: Path) -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255
    picture = resize(read_picture(save(tmp_path / "w.png", wide)), 64)
    assert picture.size == (64, 64) and picture.pixels.min() == 1  # exactly the white third
    alpha = np.zeros((64, 192), np.uint8)
    alpha[20:30, 150:170] = 255
    image = Image.fromarray(wide)
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "m.png")
    moved = resize(read_picture(tmp_path / "m.png"), 64)
    assert moved.mask is not None and moved.mask.sum() == 200
    assert moved.mask[0].nonzero()[:, 1].float().mean() == pytest.approx(31.5)


def test_contain_pads_the_picture_and_marks_the_area_that_it_covers(tmp_path: Path) -> None:
    square = resize(read_picture(save(tmp_path / "a.png", scene(48, 24))), 32, "contain")
    assert square.size == (32, 32) and square.valid is not None
    assert square.valid[0, 8:24].min() == 1 and square.valid[0, :8].max() == 0 and square.valid[0, 24:].max() == 0
    np.testing.assert_allclose((square.pixels[:, 0, 0] + 1) * 127.5, 128, atol=1e-4)
    assert resize(read_picture(save(tmp_path / "b.png", scene(40, 40))), 32, "contain").valid is None


def test_resizing_is_deterministic_and_sharp_and_keeps_the_mask_aligned(tmp_path: Path) -> None:
    big = np.kron(scene(48, 48), np.ones((7, 7, 1), np.uint8))
    image = Image.fromarray(big)
    image.putalpha(Image.fromarray((big[..., 0] > 128).astype(np.uint8) * 255))
    image.save(tmp_path / "a.png")
    one, two = (resize(read_picture(tmp_path / "a.png"), (40, 56)) for _ in range(2))
    assert one.pixels.shape == (3, 40, 56)
    assert torch.equal(one.pixels, two.pixels) and one.mask is not None and two.mask is not None
    assert torch.equal(one.mask, two.mask) and one.mask.shape == (1, 40, 56)
    red = (one.pixels[0] + 1) / 2 * one.mask[0]
    assert red[one.mask[0] == 1].min() > 0.45  # inside the mask, the picture is bright
    with pytest.raises(ValueError, match=r"unknown resize mode 'stretch'. Available: contain, cover"):
        resize(one, 32, "stretch")  # type: ignore[arg-type]


# --- folders --------------------------------------------------------------------------------


def folder(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path / name, scene())
    return tmp_path


def test_stray_files_are_skipped_with_one_warning(tmp_path: Path) -> None:
    folder(tmp_path, "b.jpg", "a.png", ".hidden.png", ".ipynb_checkpoints/a.png", "more/c.png")
    (tmp_path / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (tmp_path / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "notes.txt").write_text("my notes")
    (tmp_path / "zero.jpg").touch()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning) as caught:
        pictures, notes = list_pictures(tmp_path)
    assert [p.name for p in pictures] == ["a.png", "b.jpg"]
    assert len(caught) == len(notes) == 1 and str(caught[0].message) == notes[0]
    for part in (str(tmp_path), ".DS_Store (hidden)", "zero.jpg (empty, 0 bytes)", ".ipynb_checkpoints (hidden)"):
        assert part in notes[0]
    assert "more (a folder)" in notes[0] and not notes[0].endswith("more")
    for name in ("x1.txt", "x2.txt"):
        (tmp_path / name).write_text("x")
    with pytest.warns(UserWarning, match=r"x1\.txt \(a text file that matches no picture or clip\) and 2 more$"):
        list_pictures(tmp_path)


def test_captions_in_all_common_formats_are_read(tmp_path: Path) -> None:
    folder(tmp_path, *["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"])
    for name, text in (
        ("a.TXT", "of a"),
        ("b.caption", "of b"),
        ("c.png.txt", "of c"),
        ("d.txt", "of d"),
        ("d.caption", "another of d"),
        ("g.Caption", "of nothing"),
    ):
        (tmp_path / name).write_text(text)
    rows = [
        {"file_name": "e.png", "text": "of  e"},
        {"file_name": "train/f.png", "caption": "of f"},
        {"file_name": "a.png"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    with pytest.warns(UserWarning) as caught:
        subject = read_subject(tmp_path)
    assert {p.name: text for p, text in subject.captions.items()} == {f"{n}.png": f"of {n}" for n in "abcdef"}
    (note,) = [str(w.message) for w in caught]
    assert "d.caption (d.txt is used as the caption)" in note and "metadata" not in note
    assert "g.Caption (a text file that matches no picture or clip)" in note
    words = tmp_path / "words"
    words.mkdir()
    (tmp_path / "metadata.jsonl").rename(words / "metadata.jsonl")
    with pytest.warns(UserWarning, match="4 of 6 pictures have no caption"):
        assert len(read_subject(tmp_path, captions=words).captions) == 2
    (words / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"a.png"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2 must look like"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_subject(tmp_path, captions=words)


def test_caption_file_names_match_regardless_of_case_unless_that_is_ambiguous(tmp_path: Path) -> None:
    folder(tmp_path, "f.png", "g.png", "h.png", "H.png")
    for name, text in (("F.txt", "of f"), ("g.PNG.txt", "of g"), ("h.txt", "of h"), ("H.txt", "of H")):
        (tmp_path / name).write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {p.name: text for p, text in read_subject(tmp_path).captions.items()} == {
            "f.png": "of f",
            "g.png": "of g",
            "h.png": "of h",
            "H.png": "of H",
        }
    (tmp_path / "h.txt").unlink()
    with pytest.warns(UserWarning, match=r"1 of 4 pictures have no caption: h\.png"):
        read_subject(tmp_path)
    (tmp_path / "H.txt").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "H.PNG", "text": "of H"}')
    with pytest.warns(UserWarning, match=r"2 of 4 pictures have no caption: H\.png, h\.png"):
        read_subject(tmp_path)


def test_unused_caption_rows_are_reported(tmp_path: Path) -> None:
    folder(tmp_path, "a.png", "b.png", "c.png")
    rows = [
        {"file_name": "A.png", "text": "of a"},
        {"file_name": "gone.png", "text": "of nothing"},
        {"file_name": "b.png", "text": ["of", "b"]},
        {"file_name": "c.png", "text": None, "caption": "of c"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning) as caught:
        captions = read_subject(tmp_path).captions
    assert {p.name: text for p, text in captions.items()} == {"a.png": "of a", "c.png": "of c"}
    said = [str(w.message) for w in caught]
    assert sum("line 2: there is no file called gone.png here" in s for s in said) == 1
    assert sum("line 3: text = ['of', 'b'] is not text" in s for s in said) == 1


def test_a_class_noun_loses_its_article_or_possessive(tmp_path: Path) -> None:
    folder(tmp_path, "a.png")
    for said, noun in (("a  mug", "mug"), ("An old mug", "old mug"), ("the", "the"), ("a", "a"), (" anvil ", "anvil")):
        assert read_subject(tmp_path, said).class_noun == noun
    for said, noun in (("my mug", "mug"), ("Our old mug", "old mug"), ("his", "his"), ("all my mugs", "all my mugs")):
        assert read_subject(tmp_path, said).class_noun == noun


def test_captions_and_masks_are_not_reported_as_stray_files(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "b.jpg", "c.jpg", "masks/a.png", "b.mask.png", "c-mask.png", "wolf-mask.png")
    (tmp_path / "a.txt").write_text("a {concept}\non a table\n", encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures, notes = list_pictures(tmp_path)
    with pytest.warns(UserWarning, match="have no"):
        subject = read_subject(tmp_path, " mug ")
    assert [p.name for p in pictures] == ["a.jpg", "b.jpg", "c.jpg", "wolf-mask.png"] and not notes
    assert subject.class_noun == "mug" and subject.images == pictures
    assert subject.captions == {tmp_path / "a.jpg": "a {concept} on a table"}
    assert {k.name: v.relative_to(tmp_path).as_posix() for k, v in subject.masks.items()} == {
        "a.jpg": "masks/a.png",
        "b.jpg": "b.mask.png",
        "c.jpg": "c-mask.png",
    }


def test_unmatched_and_unusable_masks_are_reported(tmp_path: Path) -> None:
    folder(tmp_path, "a.jpg", "masks/other.png")
    (tmp_path / "masks/a.png").touch()
    with pytest.warns(UserWarning, match=r"masks/other\.png \(a mask without a picture\)") as caught:
        list_pictures(tmp_path)
    assert "masks/a.png (empty, 0 bytes)" in str(caught[0].message)


def test_the_error_for_a_folder_without_usable_pictures_names_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}/none does not exist"):
        list_pictures(tmp_path / "none")
    with pytest.raises(ValueError, match=rf"no pictures in {tmp_path}: found nothing"):
        list_pictures(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match=r"found only readme.txt \(not a picture\), sub \(a folder\)"):
        list_pictures(tmp_path)
    with pytest.raises(ValueError, match=r"readme\.txt is not a picture"):
        list_pictures(tmp_path / "readme.txt")
    with pytest.raises(ValueError, match="the list of files is empty"):
        list_pictures([])


def test_single_files_and_lists_are_accepted(tmp_path: Path) -> None:
    folder(tmp_path, "a.png", "b.png", "masks/b.png")
    assert list_pictures(str(tmp_path / "a.png"))[0] == (tmp_path / "a.png",)
    with pytest.warns(UserWarning, match=r"listed twice but used only once: b\.png"):
        pictures, _ = list_pictures([tmp_path / "b.png", tmp_path])
    assert [p.name for p in pictures] == ["b.png", "a.png"]
    assert read_subject([tmp_path / "b.png"]).masks == {tmp_path / "b.png": tmp_path / "masks/b.png"}


def test_a_mask_that_differs_in_size_from_its_picture_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, "a.png")
    (tmp_path / "masks").mkdir()
    Image.new("L", (10, 20), 255).save(tmp_path / "masks/a.png")
    with pytest.raises(ValueError, match=r"mask .*masks/a\.png is 10x20 pixels, but its picture .*a\.png is 48x32"):
        read_subject(tmp_path)


def test_masks_and_captions_may_be_given_separately(tmp_path: Path) -> None:
    photos = folder(tmp_path / "photos", "a.png", "b.png")
    other = folder(tmp_path / "cut", "a.png", "zzz.png")
    (tmp_path / "words").mkdir()
    (tmp_path / "words/b.txt").write_text("﻿hello", encoding="utf-8")
    with pytest.warns(UserWarning, match="have no"):
        subject = read_subject(photos, masks=other, captions=tmp_path / "words")
    assert subject.masks == {photos / "a.png": other / "a.png"} and subject.captions == {photos / "b.png": "hello"}
    both = {"a.png": "x  y", "b.png": "z"}
    assert read_subject(photos, captions=both).captions == {photos / "a.png": "x y", photos / "b.png": "z"}
    with pytest.raises(ValueError, match=r"captions: 'q\.png' matches no picture. The pictures are: a\.png, b\.png"):
        read_subject(photos, captions={"q.png": "x"})
    with pytest.raises(
        ValueError, match=r"masks: no file in .*words is named after a picture; the folder contains b\.txt, .* a\.png"
    ):
        read_subject(folder(tmp_path / "one", "a.png"), masks=tmp_path / "words")
    (photos / "a.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ValueError, match=r"caption .*a\.txt is not UTF-8"):
        read_subject(photos)


# --- writing --------------------------------------------------------------------------------


def test_written_pictures_can_be_read_back_with_their_text(tmp_path: Path) -> None:
    path = write_picture(
        read_picture(save(tmp_path / "a.png", scene())).pixels, tmp_path / "new/b.png", {"prompt": "é 猫"}
    )
    np.testing.assert_allclose(levels(path), scene(), atol=1e-4)
    assert read_metadata(path) == {"prompt": "é 猫"} and read_metadata(tmp_path / "a.png") == {}
    assert [p.name for p in path.parent.iterdir()] == ["b.png"]
    with pytest.raises(ValueError, match="'猫' cannot be a PNG text key"):
        write_picture(torch.zeros(3, 20, 20), path, {"猫": "x"})
    with pytest.raises(ValueError, match="NaN or Inf"):
        write_picture(torch.full((3, 20, 20), torch.nan), path)
    with pytest.raises(ValueError, match=r"\[3, H, W\]; this one has \[1, 20, 20\]"):
        write_picture(torch.zeros(1, 20, 20), path)
    np.testing.assert_allclose(levels(path), scene(), atol=1e-4)  # a failed write leaves the old file in place
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(ValueError, match=r"x\.png is not a readable PNG"):
        read_metadata(tmp_path / "x.png")


def test_to_image_clamps_and_rounds() -> None:
    pixels = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 5)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_a_grid_is_filled_row_by_row() -> None:
    pixels = torch.stack([torch.full((3, 4, 6), v) for v in (-1.0, 0.0, 1.0)])
    sheet = np.asarray(grid(pixels, 2, gap=1))
    assert sheet.shape == (9, 13, 3)
    assert sheet[0, 0, 0] == 0 and sheet[0, 7, 0] == 128 and sheet[5, 0, 0] == 255 and sheet[0, 6, 0] == 255
    assert grid(pixels[:1], 4).size == (6, 4)
    with pytest.raises(ValueError, match=r"\[0, 3, 4, 4\]"):
        grid(torch.zeros(0, 3, 4, 4))


def test_a_contact_sheet_labels_pictures_and_enlarges_them_without_smoothing() -> None:
    tiny = torch.rand(3, 3, 64, 64) * 2 - 1
    sheet = contact_sheet({"references of the thing": tiny, "猫 new scenes": torch.zeros(2, 3, 64, 64)})
    assert sheet.height >= 256
    cut = np.asarray(sheet)[4 : 4 + 128, -(4 + 128) : -4]
    expected = np.kron(np.asarray(to_image(tiny[2])), np.ones((2, 2, 1), np.uint8))
    np.testing.assert_array_equal(cut, expected)
    left = np.asarray(sheet)[4:132, : sheet.width - 3 * 132 - 4]
    assert left.min() < 100  # the labels are visible
    assert contact_sheet({"a": torch.zeros(5, 3, 64, 64)}, columns=2).height > 3 * 128
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet({})
