"""Written clips are read back correctly with their metadata. A failed write never leaves a partial clip."""

from __future__ import annotations

import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from shared.io.clips.clip_metadata import read_clip_metadata
from shared.io.clips.read_clip import read_clip
from shared.io.clips.window import ClipWindow
from shared.io.clips.write_clip import spread, write_clip, write_clip_sheet
from shared.io.contact_sheets import write_picture
from shared.io.temporary_names import is_temporary
from tests.core.clip_files import folder, greys, video

ABOUT = {"pcs": json.dumps({"prompt": 'a "photo"', "seed": 3}), "Software": "pcs", "Description": "ein Ball, größer ☺"}
FORMATS = ["clip.mp4", "clip.gif", "clip.webp", "frames"]


def moving(frames: int = 6, size: tuple[int, int] = (64, 64)) -> Tensor:
    """Returns a clip `[3, F, H, W]` of a shaded disc that crosses a smooth background. It has more than 256 colours."""
    height, width = size
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    ground = torch.stack([x * 0.5, y * 0.5, x * y])
    out = []
    for i in range(frames):
        inside = (x + 0.5 - i / frames) ** 2 + y**2 < 0.12
        out.append(torch.where(inside, torch.stack([0.6 + 0.3 * y, 0.3 * x - 0.5, 0 * x - 0.7]), ground))
    return torch.stack(out, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Returns the PSNR in decibels for values from -1 to 1."""
    return -10 * math.log10(float(((a - b) ** 2).mean()) / 4 + 1e-12)


@pytest.mark.parametrize("name", FORMATS)
def test_a_clip_reads_back_with_its_rate_and_metadata(tmp_path: Path, name: str) -> None:
    clip = moving()
    assert write_clip(tmp_path / name, clip, 8, ABOUT) == tmp_path / name
    back = read_clip(tmp_path / name, ClipWindow(length=6), size=64)
    bound = {"clip.mp4": 38, "clip.gif": 34, "clip.webp": 44, "frames": 55}[name]  # rounding to 8 bits alone gives 59
    assert psnr(back.frames, clip) > bound
    assert back.fps == pytest.approx(8, rel=0.01)
    assert read_clip_metadata(tmp_path / name) == ABOUT
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_both_tensor_layouts_give_the_same_clip(tmp_path: Path) -> None:
    clip = moving()
    write_clip(tmp_path / "a", clip, 8)
    write_clip(tmp_path / "b", clip.movedim(1, 0), 8)
    assert torch.equal(
        read_clip(tmp_path / "a", ClipWindow(length=6)).frames, read_clip(tmp_path / "b", ClipWindow(length=6)).frames
    )


def test_lossless_formats_are_exact(tmp_path: Path) -> None:
    clip = (moving(size=(40, 24)) * 127.5).round() / 127.5  # halfway between 8-bit levels, so rounding is the only loss
    for name in ("a.webp", "frames"):
        write_clip(tmp_path / name, clip, 8, enlarge=1)
        assert (read_clip(tmp_path / name, ClipWindow(length=6)).frames - clip).abs().max() <= 1 / 255 + 1e-6
    few = torch.from_numpy(greys(6)).permute(3, 0, 1, 2) / 127.5 - 1
    write_clip(tmp_path / "few.gif", few, 8, enlarge=1)  # no more than 256 colours
    assert (read_clip(tmp_path / "few.gif", ClipWindow(length=6)).frames - few).abs().max() < 1e-5


def test_small_clips_are_enlarged_without_blur_and_odd_sizes_are_made_even(tmp_path: Path) -> None:
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2.0 - 1
    write_clip(tmp_path / "a.mp4", checks.expand(3, 4, 64, 64), 8)
    large = read_clip(tmp_path / "a.mp4", ClipWindow(length=4)).frames
    assert large.shape == (3, 4, 256, 256)
    centres = large[:, :, 1::4, 1::4]
    assert (centres - checks).abs().max() < 0.2  # every pixel keeps its value
    write_clip(tmp_path / "b.mp4", moving(4, (33, 35)), 8, enlarge=1)
    odd = read_clip(tmp_path / "b.mp4", ClipWindow(length=4)).frames
    assert odd.shape == (3, 4, 34, 36) and psnr(odd[..., :33, :35], moving(4, (33, 35))) > 28
    assert (odd[..., 33, :] - odd[..., 32, :]).abs().mean() < 0.05
    assert write_clip(tmp_path / "c.gif", moving(2, (300, 400)), 8) and Image.open(tmp_path / "c.gif").size == (
        400,
        300,
    )


def test_an_mp4_file_can_be_played_everywhere(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", moving(), 12.5, ABOUT)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # playback can start while the file is loading
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12.5)
        assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
        assert json.loads(file.metadata["comment"]) == ABOUT


@pytest.mark.parametrize("name", ["clip.gif", "clip.webp"])
def test_animations_loop_forever_and_keep_their_duration(tmp_path: Path, name: str) -> None:
    write_clip(tmp_path / name, moving(12), 12, enlarge=1)  # 83.3 ms per frame, which a GIF cannot store
    with Image.open(tmp_path / name) as image:
        assert image.info["loop"] == 0
        total = 0
        for i in range(12):
            image.seek(i)
            image.load()
            total += image.info["duration"]
    assert total == 1000
    assert read_clip(tmp_path / name, ClipWindow(fps=12, length=12)).picks == tuple(range(12))


def test_a_gif_does_not_flicker(tmp_path: Path) -> None:
    """Pixels that are constant in the clip are constant in the GIF, and smooth areas keep their mean colour."""
    clip = moving(6)
    clip[:, :, :12] = clip[:, :1, :12]
    write_clip(tmp_path / "a.gif", clip, 8, enlarge=1)
    back = read_clip(tmp_path / "a.gif", ClipWindow(length=6)).frames
    assert bool((back[:, :, :12] == back[:, :1, :12]).all())
    bands = torch.nn.functional.avg_pool2d((back - clip).movedim(1, 0), 8)
    assert bands.abs().max() < 0.05  # the mean over 8x8 pixels is correct to within 6 of 255 levels


def test_a_frozen_clip_keeps_its_duration(tmp_path: Path) -> None:
    """Identical frames are merged into one frame that is shown for longer."""
    for name in ("a.gif", "a.webp"):
        write_clip(tmp_path / name, moving(1).expand(-1, 8, -1, -1), 8)
        assert read_clip(tmp_path / name, ClipWindow(fps=8, length=8)).frames.shape[1] == 8


def test_clips_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    for path, clip, fps, words in [
        ("a.avi", moving(), 8, r"a\.avi: use one of \.mp4, \.gif, \.webp"),
        ("a.mp4", moving()[0], 8, r"must have the shape \[3, F, H, W\]; this one has \[6, 64, 64\]"),
        ("a.mp4", moving() * float("nan"), 8, "NaN or Inf"),
        ("a.mp4", moving(), 0, "fps = 0"),
        ("a.mp4", moving(), float("inf"), "fps = inf"),
        ("a.gif", moving(), 60, "60 frames per second exceeds a GIF's limit of 50"),
    ]:
        with pytest.raises(ValueError, match=words):
            write_clip(tmp_path / path, clip, fps)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_pcs_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    write_clip(tmp_path / "ours", moving(4), 8)
    write_clip(tmp_path / "ours", moving(2), 8)
    assert len(list((tmp_path / "ours").glob("*.png"))) == 2
    theirs = folder(tmp_path / "theirs", greys(3))
    with pytest.raises(ValueError, match="did not write"):
        write_clip(theirs, moving(), 8)
    assert len(list(theirs.iterdir())) == 3


def test_files_that_pcs_did_not_write_have_no_metadata_or_are_refused(tmp_path: Path) -> None:
    assert read_clip_metadata(video(tmp_path / "a.mp4", greys(2))) == {}
    write_picture(moving()[:, 0], tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png is not a clip in a format that pcs writes"):
        read_clip_metadata(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"b\.mp4 cannot be opened"):
        read_clip_metadata(tmp_path / "b.mp4")


# --- all or nothing ----------------------------------------------------------------------


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Limits files to 16 KiB, so that writing more fails, as it would on a full disk."""
    before, usual = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, usual)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_no_partial_file(tmp_path: Path, name: str) -> None:
    noise = torch.rand(3, 8, 96, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if "." in name:
        (tmp_path / name).write_bytes(b"what was there")
    with pytest.raises(OSError):
        write_clip(tmp_path / name, noise, 8, enlarge=1)
    assert [p.name for p in tmp_path.iterdir()] == ([name] if "." in name else [])
    assert "." not in name or (tmp_path / name).read_bytes() == b"what was there"


def test_a_killed_write_leaves_the_old_file_intact(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"what was there")
    code = """
import sys, torch
from shared.io.clips.write_clip import write_clip
write_clip(sys.argv[1], torch.rand(3, 150, 128, 128) * 2 - 1, 8, enlarge=1)
"""
    child = subprocess.Popen([sys.executable, "-c", code, str(path)])
    try:
        while not any(is_temporary(p.name) and p.stat().st_size > 0 for p in tmp_path.iterdir()):
            assert child.poll() is None, "the process ended before it could be killed"
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert path.read_bytes() == b"what was there"
    (left,) = (p.name for p in tmp_path.iterdir() if p != path)
    assert is_temporary(left) and not left.endswith(".mp4")  # no truncated file looks like a clip
    write_clip(path, moving(2), 8)  # removes the file that the killed process left behind
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


# --- contact sheets -----------------------------------------------------------------------------


def test_the_frames_on_a_sheet_are_spread_over_the_whole_clip(tmp_path: Path) -> None:
    clip = torch.arange(16.0).view(1, 16, 1, 1).expand(3, 16, 32, 32) / 16
    assert (spread(clip, 4)[:, 0, 0, 0] * 16).tolist() == [0, 5, 10, 15]
    assert (spread(clip, 99)[:, 0, 0, 0] * 16).tolist() == list(range(16)) and len(spread(clip, 1)) == 1
    write_clip_sheet(tmp_path / "a.png", {"one": clip, "two": clip[:, :3]}, columns=5, metadata={"pcs": "x"})
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape[1] > 5 * 128 and sheet.shape[0] > 2 * 128
