"""Clips that cannot be used are refused with errors that name the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.io.clips.open_frames import open_frames
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from tests.core.clip_files import animation, cover_art, folder, greys, noisy, sound, video, without_streams


def refused(path: Path, *words: str, **settings: Any) -> None:
    """Asserts that reading fails with a message that names the file and then contains the given words in order."""
    with pytest.raises(ValueError) as error:
        read_clip(path, ClipWindow(**settings))
    assert re.search(".*".join(re.escape(w) for w in (str(path), *words)), str(error.value)), error.value


def test_the_error_for_a_short_clip_states_its_length(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", greys(8))
    refused(path, "has 8 frames, but length=9", "length=8 or less", length=9)
    refused(
        path, "has 4 frames with stride 2, but length=5", "length=4 or less or a smaller stride", length=5, stride=2
    )
    refused(path, "has 4 frames at 4 frames per second, but length=16", "a higher fps", length=16, fps=4)
    refused(path, "has 4 frames from 0.5 s onwards, but length=5", "an earlier start", length=5, start=0.5)
    refused(path, "has 0 frames", "an earlier start", start=7)


def test_a_video_of_one_frame_is_a_clip(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", greys(1))
    refused(path, "has 1 frame, but length=16")
    assert read_clip(path, ClipWindow(length=1)).frames.shape == (3, 1, 32, 48)


def test_files_that_are_not_clips_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    refused(tmp_path / "a.mp4", "is not a clip", "mp4, mov, webm")
    (tmp_path / "b.mp4").touch()
    refused(tmp_path / "b.mp4", "is empty (0 bytes)")
    refused(tmp_path / "c.mp4", "does not exist")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")  # a playlist must not open other files
    refused(tmp_path / "list.m3u8", "is not a clip")
    single = folder(tmp_path / "d", greys(1)) / "frame_0.png"
    refused(single, "is one picture, not a clip")


def test_a_file_with_only_audio_is_refused(tmp_path: Path) -> None:
    refused(sound(tmp_path / "a.mp4"), "has no video stream, only audio")


def test_a_cover_picture_is_not_a_clip(tmp_path: Path) -> None:
    refused(cover_art(tmp_path / "a.mp4"), "has no video stream, only cover art")


def test_a_file_without_streams_is_refused(tmp_path: Path) -> None:
    refused(without_streams(tmp_path / "a.mp4"), "is damaged or truncated: it contains no streams")


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif", "webp", "png"])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str) -> None:
    whole = tmp_path / f"whole.{ending}"
    if ending in ("mp4", "webm"):
        options = {"deadline": "realtime"} if ending == "webm" else {}
        video(whole, noisy(16), "libvpx-vp9" if ending == "webm" else "libx264", options=options)
    else:
        animation(whole, noisy(16))
    assert read_clip(whole).frames.shape[1] == 16
    data = whole.read_bytes()
    for share in (0.2, 0.5, 0.9):
        path = tmp_path / f"cut.{ending}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match="truncated") as error:
            read_clip(path, ClipWindow(length=1))  # refused even though the intact frames would suffice
        assert str(path) in str(error.value)


def test_the_error_for_a_truncated_video_states_how_many_frames_it_has(tmp_path: Path) -> None:
    data = video(tmp_path / "a.mp4", noisy(16)).read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: len(data) * 6 // 10])
    refused(tmp_path / "b.mp4", "is truncated: it has ", " of 16 frames", "ffmpeg")


def test_a_video_without_its_index_is_refused(tmp_path: Path) -> None:
    data = video(tmp_path / "a.mp4", noisy(4)).read_bytes()
    (tmp_path / "b.mp4").write_bytes(data.replace(b"moov", b"moof"))
    refused(tmp_path / "b.mp4", "")


def test_a_video_with_damaged_frames_is_refused(tmp_path: Path) -> None:
    data = bytearray(video(tmp_path / "a.mp4", noisy(16)).read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    (tmp_path / "b.mp4").write_bytes(data)
    refused(tmp_path / "b.mp4", "cannot be read as a video; it is damaged")


# --- folders of frames ----------------------------------------------------------------------


def test_frames_are_read_in_natural_order(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", greys(12), "shot3_frame{}.png")
    assert [p.name for p in open_frames(path).files] == [f"shot3_frame{i}.png" for i in range(12)]  # type: ignore[attr-defined]


def test_gaps_in_the_numbering_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", greys(6))
    (path / "frame_3.png").unlink()
    refused(path, "gap in its numbering: frame_2.png is followed by frame_4.png")
    even = folder(tmp_path / "b", greys(12), "{}.png")
    for i in range(1, 12, 2):
        (even / f"{i}.png").unlink()
    assert read_clip(even, ClipWindow(length=6)).frames.shape[1] == 6  # a constant step in the numbering is not a gap


def test_duplicate_frame_numbers_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", greys(3))
    (path / "frame_01.png").write_bytes((path / "frame_1.png").read_bytes())
    refused(path, "contains the same frame number twice: frame_01.png, frame_1.png")


def test_two_series_in_one_folder_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", greys(3))
    for i in range(3):
        (path / f"other_{i}.png").write_bytes((path / f"frame_{i}.png").read_bytes())
    refused(path, "contains 2 series of frames", "its own folder")


def test_frames_of_different_sizes_are_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", greys(3))
    folder(tmp_path / "b", greys(1, (32, 32)))
    (tmp_path / "b/frame_0.png").rename(path / "frame_3.png")
    with pytest.raises(
        ValueError, match=r"frame_3\.png is 32x32 pixels, but frame_0\.png is 48x32: all frames of a clip"
    ):
        read_clip(path)


def test_a_folder_without_frames_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    refused(tmp_path / "a", "")


def test_a_start_in_seconds_in_a_folder_of_frames_requires_a_frame_rate(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", greys(8))
    refused(path, "without a rate", "set fps", start=0.25, length=2)
    assert read_clip(path, ClipWindow(start=0.25, fps=8, length=2)).picks == (2, 3)


def test_sizes_are_checked_before_anything_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [
        video(tmp_path / "a.mp4", greys(2)),
        animation(tmp_path / "a.gif", greys(2)),
        folder(tmp_path / "a", greys(2)),
    ]
    tiny = folder(tmp_path / "b", np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="each side must be at least 16"):
        read_clip(tiny, ClipWindow(length=2))
    monkeypatch.setattr("shared.io.decode.check_size.__defaults__", (1000, 16))
    for path in paths:
        with pytest.raises(ValueError, match="above the limit of 1,000"):
            read_clip(path, ClipWindow(length=2))
