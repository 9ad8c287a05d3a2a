"""Clips are found in folders together with their captions and masks."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from PIL import Image

from shared.io.clips.find_clips import ClipListing, find_clips
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from tests.core.clip_files import animation, folder, greys, sound, video


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return video(tmp_path_factory.mktemp("v") / "a.mp4", greys(2)).read_bytes()


def quietly(*given: object, **settings: object) -> ClipListing:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return find_clips(*given, **settings)  # type: ignore[arg-type]


def test_clips_of_every_kind_are_found_with_captions_and_masks(tmp_path: Path, mp4: bytes) -> None:
    root = tmp_path / "clips"
    frames = folder(root / "c", greys(2))
    folder(root / "c/masks", greys(2))
    (root / "c/caption.txt").write_text("a ball  that\nbounces")
    (root / "a.mp4").write_bytes(mp4)
    (root / "a.txt").write_text("a ball that rolls")
    folder(root / "masks/a", greys(2), "{}.png")
    gif = animation(root / "b.gif", greys(2))
    (root / "b.txt").write_text("a ball that spins")
    Image.fromarray(greys(1)[0]).save(root / "b-mask.png")
    found = quietly(root)
    assert found.clips == (root / "a.mp4", gif, frames) and found.warnings == ()
    texts = ["a ball that rolls", "a ball that spins", "a ball that bounces"]
    assert list(found.captions.values()) == texts and list(found.captions) == list(found.clips)
    assert found.masks == {root / "a.mp4": root / "masks/a", gif: root / "b-mask.png", frames: frames}
    for clip in found.clips:
        assert read_clip(clip, ClipWindow(length=2), mask=found.masks[clip]).masks is not None


def test_a_folder_of_frames_is_one_clip(tmp_path: Path) -> None:
    frames = folder(tmp_path / "a", greys(3))
    (tmp_path / "a/caption.txt").write_text("a ball")
    folder(tmp_path / "a/masks", greys(3))
    found = quietly(frames)
    assert found.clips == (frames,) and found.captions == {frames: "a ball"} and found.masks == {frames: frames}


def test_skipped_files_are_listed_with_reasons(tmp_path: Path, mp4: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(mp4)
    (tmp_path / "b.mp4").write_bytes(mp4[:100])
    (tmp_path / "empty.mov").touch()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.mask.gif").write_bytes(b"")
    Image.fromarray(greys(1)[0]).save(tmp_path / "still.png")
    Image.fromarray(greys(1)[0]).save(tmp_path / "lost-mask.png")
    sound(tmp_path / "song.m4a")
    with pytest.warns(UserWarning) as said:
        found = find_clips(tmp_path)
    assert found.clips == (tmp_path / "a.mp4",) and len(said) == 1
    note = str(said[0].message)
    assert note.startswith(f"{tmp_path}: skipped files that are not clips: ")
    for words in (
        ".hidden (hidden)",
        "b.mp4 (cannot be read as a video; it is damaged or truncated",
        "empty.mov (empty, 0 bytes)",
        "notes.md (not a video)",
        "lost-mask.png (a mask without a clip)",
        "still.png (one picture, not a clip",
        " and 1 more",
    ):
        assert words in note
    with pytest.raises(ValueError, match=r"song\.m4a is not a clip \(has no video stream, only audio\)"):
        find_clips(tmp_path / "song.m4a")


def test_missing_captions_are_reported_and_named_files_must_exist(tmp_path: Path, mp4: bytes) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.mp4").write_bytes(mp4)
    (tmp_path / "a.txt").write_text("a ball")
    with pytest.warns(UserWarning, match=r"1 of 2 clips have no caption: b\.mp4; their captions come"):
        find_clips(tmp_path)
    named = quietly([tmp_path / "b.mp4"], captions={"b.mp4": "a  ball"}, masks={tmp_path / "b.mp4": tmp_path / "m.gif"})
    assert named.captions == {tmp_path / "b.mp4": "a ball"} and named.masks == {tmp_path / "b.mp4": tmp_path / "m.gif"}
    with pytest.raises(ValueError, match=r"captions: 'c\.mp4' matches no clip. The clips are: a\.mp4, b\.mp4"):
        find_clips(tmp_path, captions={"c.mp4": "x"})
    with pytest.raises(ValueError, match="no file in .* has a clip's name; the folder contains x.txt"):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts/x.txt").write_text("x")
        find_clips(tmp_path, captions=tmp_path / "texts")
    with pytest.raises(ValueError, match="does not exist"):
        find_clips(tmp_path / "c.mp4")
    with pytest.warns(UserWarning, match=r"listed twice but used only once: b\.mp4"):
        assert len(find_clips([tmp_path / "b.mp4", tmp_path / "b.mp4"]).clips) == 1


def test_a_folder_without_clips_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no clips in .*: found nothing; give mp4"):
        find_clips(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"found only a\.txt \(not a video\)"):
        find_clips(tmp_path)
