"""Clips are read from every kind of file with the right timing, orientation, colours and windows."""

from __future__ import annotations

import subprocess
import sys
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from shared.io.clips.frame_colors import to_image
from shared.io.clips.open_frames import open_frames
from shared.io.clips.read_clip import read_clip, read_windows
from shared.io.clips.window import ClipWindow
from tests.core.clip_files import animation, folder, greys, noisy, numbers, remuxed, video

ALL = ClipWindow(length=8)


def levels(frames: torch.Tensor) -> np.ndarray:
    """Converts a clip `[3, F, H, W]` in [-1, 1] to `[F, H, W, 3]` in [0, 255]."""
    return (frames.permute(1, 2, 3, 0).numpy() + 1) * 127.5


MAKERS = {
    "mp4": lambda p: video(p / "a.mp4", greys()),
    "mov": lambda p: video(p / "a.mov", greys(), "mpeg4"),
    "webm": lambda p: video(p / "a.webm", greys(), "libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8"}),
    "vp8 with hidden frames": lambda p: video(
        p / "b.webm", greys(), "libvpx", options={"auto-alt-ref": "1", "lag-in-frames": "8", "cpu-used": "8"}
    ),
    "gif": lambda p: animation(p / "a.gif", greys()),
    "webp": lambda p: animation(p / "a.webp", greys()),
    "apng": lambda p: animation(p / "a.png", greys()),
    "folder": lambda p: folder(p / "a", greys()),
    "misnamed": lambda p: video(p / "a.mp4", greys()).rename(p / "a.jpg"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_of_clip_is_read_with_its_frames_in_order(tmp_path: Path, kind: str) -> None:
    clip = read_clip(MAKERS[kind](tmp_path), ALL)
    assert clip.frames.shape == (3, 8, 32, 48) and clip.frames.dtype == torch.float32
    assert numbers(clip.frames) == list(range(8)) and clip.picks == tuple(range(8))
    assert clip.masks is None and clip.valid is None
    # A GIF stores times in hundredths of a second.
    assert clip.fps == (None if kind == "folder" else pytest.approx(8, rel=0.05))


@pytest.mark.parametrize("kind", ["ffv1", "webp", "png"])
def test_lossless_frames_are_exact(tmp_path: Path, kind: str) -> None:
    frames = noisy(4, (33, 17))  # odd sides
    makers = {
        "ffv1": lambda: video(tmp_path / "a.mkv", frames, "ffv1", "bgr0"),
        "webp": lambda: animation(tmp_path / "a.webp", frames, exact=True),
        "png": lambda: folder(tmp_path / "a", frames),
    }
    clip = read_clip(makers[kind](), ClipWindow(length=4))
    np.testing.assert_allclose(levels(clip.frames), frames, atol=1e-4)


# --- times ----------------------------------------------------------------------------------

STAMPS = [0, 100, 150, 400, 450, 900, 1000, 1600]  # milliseconds


@pytest.mark.parametrize("ending", ["mp4", "webm", "gif"])
@pytest.mark.parametrize("fps", [5, 10, 24])
def test_variable_frame_rates_are_sampled_by_time(tmp_path: Path, ending: str, fps: int) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "gif":
        animation(path, greys(), [*np.diff(STAMPS).tolist(), 400])
    else:
        codec = "libx264" if ending == "mp4" else "libvpx-vp9"
        video(path, greys(), codec, stamps=STAMPS, options={} if ending == "mp4" else {"deadline": "realtime"})
    length = int(1.6 * fps)
    clip = read_clip(path, ClipWindow(fps=fps, length=length))
    on_screen = [max(i for i, stamp in enumerate(STAMPS) if stamp <= 1000 * k / fps + 5) for k in range(length)]
    assert clip.picks == tuple(on_screen) and numbers(clip.frames) == on_screen and clip.fps == fps


def test_frames_are_neither_repeated_nor_dropped_because_of_millisecond_timestamps(tmp_path: Path) -> None:
    """At 24 frames per second, the second frame is due at 41.67 ms, but WebM stores 42 ms."""
    path = video(tmp_path / "a.webm", greys(12, (16, 16)), "libvpx-vp9", fps=24, options={"deadline": "realtime"})
    assert read_clip(path, ClipWindow(fps=24, length=12)).picks == tuple(range(12))
    assert read_clip(path, ClipWindow(fps=12, length=6)).picks == (0, 2, 4, 6, 8, 10)
    assert read_clip(path, ClipWindow(fps=48, length=24)).picks == tuple(i // 2 for i in range(24))


def test_a_rounded_frame_rate_is_treated_as_the_exact_one(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", greys(12, (16, 16)), fps=Fraction(30000, 1001))
    assert read_clip(path, ClipWindow(fps=29.98, length=12)).picks == tuple(range(12))


def test_very_short_gif_delays_are_replaced_as_in_browsers(tmp_path: Path) -> None:
    timing = open_frames(animation(tmp_path / "a.gif", greys(), 10)).timing
    assert timing is not None and [float(t) for t in timing.times[:3]] == pytest.approx([0, 0.1, 0.2])


def test_stride_start_and_windows_select_the_right_frames(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", greys(12, (16, 16)), options={"g": "3", "bf": "2"})
    assert numbers(read_clip(path, ClipWindow(length=4, stride=3)).frames) == [0, 3, 6, 9]
    late = read_clip(path, ClipWindow(length=3, start=0.99))  # 0.99 s is frame 7.92 at 8 frames per second
    assert numbers(late.frames) == [8, 9, 10]
    assert numbers(read_clip(path, ClipWindow(length=2, start=0.99, fps=8)).frames) == [7, 8]
    windows = list(read_windows(path, ClipWindow(length=4, windows=3)))
    assert [numbers(w.frames) for w in windows] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    with pytest.warns(UserWarning, match=r"a\.mp4 has only 2 distinct windows of 11 frames, but windows=5"):
        assert len(list(read_windows(path, ClipWindow(length=11, windows=5)))) == 2


def test_any_single_frame_can_be_read(tmp_path: Path) -> None:
    """Seeking lands on key frames, and this file has only a few.

    Its groups of pictures are open, so some frames are displayed before the key frame that precedes them in the file.
    """
    frames = greys(12, (16, 16))
    path = video(tmp_path / "a.mp4", frames, options={"g": "5", "bf": "3", "x264-params": "open-gop=1:b-adapt=0"})
    source = open_frames(path)
    for index in range(12):
        picture = next(source.frames([index]))
        assert numbers(picture.pixels[:, None]) == [index]


# --- display ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0), (0, -1, -1, 0)]
)
def test_display_matrices_are_applied(tmp_path: Path, matrix: tuple[int, int, int, int]) -> None:
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24], frame[:16, 24:], frame[16:, :24] = 80, 160, 240
    source = video(tmp_path / "a.mp4", np.stack([frame] * 2))
    path = remuxed(source, tmp_path / "b.mp4", list(matrix))
    a, b, c, d = matrix  # x' = a x + c y, y' = b x + d y
    y, x = np.mgrid[:32, :48]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    shown = np.zeros((down.max() + 1, right.max() + 1, 3))
    shown[down, right] = frame
    clip = read_clip(path, ClipWindow(length=2))
    np.testing.assert_allclose(levels(clip.frames)[1], shown, atol=6)


def test_non_square_pixels_are_made_square(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.sample_aspect_ratio = stream.codec_context.sample_aspect_ratio = 2
        file.mux(stream.encode(av.VideoFrame.from_ndarray(greys(1)[0], format="rgb24")))
        file.mux(stream.encode())
    assert open_frames(path).size == (96, 32)


def test_transparency_becomes_a_mask_on_a_neutral_background(tmp_path: Path) -> None:
    frames = np.concatenate([greys(4), np.full((4, 32, 48, 1), 255, np.uint8)], -1)
    frames[1:, :, :24, 3] = 0  # the first frame is opaque, and the left half of all other frames is transparent
    vp9 = {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "0"}
    paths = [
        animation(tmp_path / "a.webp", frames, exact=True),
        animation(tmp_path / "a.png", frames),
        folder(tmp_path / "a", frames),
        video(tmp_path / "a.webm", frames, "libvpx-vp9", "yuva420p", options=vp9),
    ]
    for path in paths:
        clip = read_clip(path, ClipWindow(length=4))
        assert clip.masks is not None and clip.masks.shape == (1, 4, 32, 48), path
        shown = levels(clip.frames)
        assert clip.masks[:, 0].min() > 0.95 and clip.masks[:, 1:, :, 30:].min() > 0.95
        assert clip.masks[:, 1:, :, :18].max() < 0.05
        np.testing.assert_allclose(shown[1:, :, :18], 128, atol=3)
        np.testing.assert_allclose(shown[2, :, 30:], 60, atol=4)


def test_the_frames_of_a_gif_that_stores_only_changes_are_reconstructed(tmp_path: Path) -> None:
    frames = greys(1, (32, 32)).repeat(4, 0)
    for i in range(4):
        frames[i, 4:8, 4 + 6 * i : 8 + 6 * i] = (250, 10, 10)
    clip = read_clip(animation(tmp_path / "a.gif", frames, optimize=True), ClipWindow(length=4))
    assert clip.masks is None
    np.testing.assert_allclose(levels(clip.frames), frames, atol=3)


# --- colours ----------------------------------------------------------------------------------


def plain(pixel_format: str, codes: tuple[float, float, float], **tags: int) -> Any:
    """Returns a frame of a single YCbCr colour."""
    frame: Any = av.VideoFrame(64, 64, pixel_format)
    for plane, code in zip(frame.planes, codes, strict=True):
        kind = np.uint16 if "10" in pixel_format else np.uint8
        plane.update(np.full(plane.buffer_size // np.dtype(kind).itemsize, round(code), kind).tobytes())
    for tag, value in tags.items():
        setattr(frame, tag, value)
    return frame


def shown(frame: Any) -> list[float]:
    return np.asarray(to_image(frame))[20:40, 20:40].reshape(-1, 3).mean(0).tolist()


def test_ten_bit_frames_become_eight_bit() -> None:
    assert shown(plain("yuv420p10le", (940, 512, 512))) == [255, 255, 255]
    assert shown(plain("yuv420p10le", (64, 512, 512))) == [0, 0, 0]
    assert shown(plain("yuv420p10le", (64 + 876 * 0.5, 512, 512))) == pytest.approx([127.5] * 3, abs=1)


def test_the_stated_matrix_and_range_are_used() -> None:
    red_709, red_601 = (63, 102, 240), (81, 90, 240)
    assert shown(plain("yuv420p", red_709, colorspace=1)) == pytest.approx([255, 0, 0], abs=2)
    assert shown(plain("yuv420p10le", tuple(4 * c for c in red_709), colorspace=1)) == pytest.approx([255, 0, 0], abs=2)
    # If a small frame does not state its matrix, BT.601 is used.
    assert shown(plain("yuv420p", red_601)) == pytest.approx([255, 0, 0], abs=2)
    assert shown(plain("yuv420p", (100, 128, 128), color_range=2)) == pytest.approx([100] * 3, abs=1)


def oetf(light: float) -> float:
    return 255 * (1.055 * light ** (1 / 2.4) - 0.055)


def test_hdr_is_tone_mapped_to_srgb() -> None:
    """Diffuse white is 203 nits, which corresponds to a signal of 58.06% in PQ and 75% in HLG (ITU-R BT.2408)."""
    tags = {"colorspace": 9, "color_primaries": 9}
    white = oetf(0.75 + 0.25 * (1 - np.exp(-1)))
    pq, hlg = (64 + 876 * 0.5806, 512, 512), (64 + 876 * 0.75, 512, 512)
    assert shown(plain("yuv420p10le", pq, color_trc=16, **tags)) == pytest.approx([white] * 3, abs=1.5)
    assert shown(plain("yuv420p10le", hlg, color_trc=18, **tags)) == pytest.approx([white] * 3, abs=1.5)
    power = (0.2 * 203 / 10000) ** (2610 / 16384)  # a fifth of diffuse white, encoded as in SMPTE ST 2084
    code = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** (2523 / 32)
    grey = shown(plain("yuv420p10le", (64 + 876 * code, 512, 512), color_trc=16, **tags))
    assert grey == pytest.approx([oetf(0.2)] * 3, abs=1.5)


def test_wide_primaries_are_converted() -> None:
    """The frame encodes the red primary of BT.709 in BT.2020."""
    r, g, b = (np.array([0.6274, 0.0691, 0.0164]) ** (1 / 2.4)).tolist()
    luma = 0.2627 * r + 0.6780 * g + 0.0593 * b
    codes = (64 + 876 * luma, 512 + 896 * (b - luma) / 1.8814, 512 + 896 * (r - luma) / 1.4746)
    frame = plain("yuv420p10le", codes, colorspace=9, color_primaries=9, color_trc=14)
    assert shown(frame) == pytest.approx([255, 0, 0], abs=12)
    assert shown(frame)[0] > 253


# --- size -------------------------------------------------------------------------------------


def test_cover_crops_all_frames_alike_around_the_masks(tmp_path: Path) -> None:
    frames = np.concatenate([greys(3, (96, 32)), np.zeros((3, 32, 96, 1), np.uint8)], -1)
    for i in range(3):
        frames[i, 8:24, 60 + 8 * i : 68 + 8 * i, 3] = 255  # the masks span columns 60 to 84, so the crop spans 56 to 88
    clip = read_clip(animation(tmp_path / "a.webp", frames, exact=True), ClipWindow(length=3), size=32)
    assert clip.masks is not None and clip.frames.shape == (3, 3, 32, 32)
    for i in range(3):
        columns = (clip.masks[0, i] > 0.5).any(0).nonzero()[:, 0]
        assert (int(columns[0]), int(columns[-1]) + 1) == (4 + 8 * i, 12 + 8 * i)


def test_cover_warns_once_about_the_loss_and_contain_keeps_everything(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", greys(4, (96, 32)))
    with pytest.warns(UserWarning, match="the crop loses 67%") as said:
        read_clip(path, ClipWindow(length=4), size=16)
    assert len(said) == 1
    clip = read_clip(path, ClipWindow(length=4), size=24, fit="contain")
    assert clip.valid is not None and clip.valid.shape == (1, 4, 24, 24)
    assert clip.valid[0, 3, 8:16].min() == 1 and clip.valid[0, 3, :7].max() == 0


def test_4k_clips_are_read_in_bounded_memory(tmp_path: Path) -> None:
    """An RGB frame takes 25 MB. Twelve more frames must raise the peak memory by less than six frames' worth."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        frame: Any = av.VideoFrame(3840, 2160, "yuv420p")
        for plane in frame.planes:
            plane.update(bytes([90]) * plane.buffer_size)
        for i in range(17):
            frame.pts = i
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    code = """
import resource, sys, warnings
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
warnings.simplefilter("ignore")
for length in (5, 17):
    shape = read_clip(sys.argv[1], ClipWindow(length=length), size=64).frames.shape
    print(list(shape), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    (few, before), (many, after) = (line.rsplit(" ", 1) for line in run.stdout.splitlines())
    assert (few, many) == ("[3, 5, 64, 64]", "[3, 17, 64, 64]")
    assert int(after) - int(before) < 6 * 25_000  # kilobytes


def test_readable_clips_cause_no_warning(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for maker in MAKERS.values():
            (tmp_path / str(id(maker))).mkdir()
            read_clip(maker(tmp_path / str(id(maker))), ALL, size=(32, 48))
