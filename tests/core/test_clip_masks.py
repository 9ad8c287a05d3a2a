"""Clip masks are read from files, pooled to the latent grid, and tracked from the first frame."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from shared.io.clips.read_clip import read_clip, read_windows
from shared.io.clips.window import ClipWindow
from shared.masks import Track, pool_masks
from tests.core.clip_files import animation, folder, greys, video

ALL = ClipWindow(length=8)


def boxes(count: int = 8, size: tuple[int, int] = (48, 32)) -> np.ndarray:
    """Returns masks `[F, H, W, 3]` of a white box that moves by 4 pixels per frame and is missing from the last."""
    out = np.zeros((count, size[1], size[0], 3), np.uint8)
    for i in range(count - 1):
        out[i, 8:24, 4 * i : 4 * i + 16] = 255
    return out


def test_masks_next_to_a_clip_are_read_with_its_frames(tmp_path: Path) -> None:
    clip = video(tmp_path / "a.mp4", greys())
    given = [
        video(tmp_path / "m.mkv", boxes(), "ffv1", "bgr0"),
        animation(tmp_path / "m.gif", boxes()),
        folder(tmp_path / "m", boxes(), "{}.png"),
        folder(tmp_path / "labels", boxes() // 255, "{}.png"),  # label maps with the values 0 and 1
    ]
    truth = torch.from_numpy(boxes()[..., 0] / 255).float()
    for path in given:
        window = read_clip(clip, ClipWindow(length=3, stride=2, start=0.25), mask=path)
        assert window.masks is not None and torch.equal(window.masks[0], truth[list(window.picks)]), path


def test_masks_inside_a_folder_of_frames_are_read(tmp_path: Path) -> None:
    frames = folder(tmp_path / "a", greys())
    folder(tmp_path / "a/masks", boxes())
    clip = read_clip(frames, ALL, mask=frames)
    assert clip.masks is not None and torch.equal(clip.masks[0], torch.from_numpy(boxes()[..., 0] / 255).float())
    (frames / "masks/frame_3.png").unlink()
    with pytest.raises(ValueError, match=r"7 of 8 frames have a mask; frames without one: frame_3\.png"):
        read_clip(frames, ALL, mask=frames)
    for i in (1, 2, 4, 5, 6, 7):
        (frames / f"masks/frame_{i}.png").unlink()
    clip = read_clip(frames, ALL, mask=frames)
    assert clip.masks is not None and clip.masks.shape == (1, 1, 32, 48)


def test_a_single_mask_belongs_to_the_first_frame(tmp_path: Path) -> None:
    clip = video(tmp_path / "a.mp4", greys())
    Image.fromarray(boxes(2)[0]).save(tmp_path / "m.png")
    first = read_clip(clip, ALL, mask=tmp_path / "m.png").masks
    assert first is not None and torch.equal(first[0], torch.from_numpy(boxes(2)[:1, :, :, 0] / 255).float())
    with pytest.raises(ValueError, match="is the mask of the clip's first frame, but this window begins at frame 6"):
        list(read_windows(clip, ClipWindow(length=2, windows=2), mask=tmp_path / "m.png"))


def test_masks_that_do_not_match_the_frames_are_refused(tmp_path: Path) -> None:
    clip = video(tmp_path / "a.mp4", greys())
    few = folder(tmp_path / "few", boxes(6), "{}.png")
    with pytest.raises(ValueError, match=f"{re.escape(str(few))} contains 6 masks, but .* 8 frames"):
        read_clip(clip, ALL, mask=few)
    small = folder(tmp_path / "small", boxes(8, (32, 32)), "{}.png")
    with pytest.raises(ValueError, match="is 32x32 pixels, but .* is 48x32"):
        read_clip(clip, ALL, mask=small)
    empty = folder(tmp_path / "empty", 0 * boxes(), "{}.png")
    with pytest.raises(ValueError, match="the masks are black in every frame used"):
        read_clip(clip, ALL, mask=empty)


# --- pooling --------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "latents", "ratio"), [(9, 3, 4), (17, 3, 8), (13, 4, 4), (5, 5, 1), (1, 1, 1)])
def test_pooling_averages_over_each_latent_cell(frames: int, latents: int, ratio: int) -> None:
    masks = torch.rand(2, 1, frames, 12, 8, generator=torch.Generator().manual_seed(0))
    pooled = pool_masks(masks, (latents, 3, 4))
    assert pooled.shape == (2, 1, latents, 3, 4)
    for z in range(latents):
        group = range(1) if z == 0 else range(1 + (z - 1) * ratio, 1 + z * ratio)
        for y in range(3):
            for x in range(4):
                cell = masks[:, 0, list(group), 4 * y : 4 * y + 4, 2 * x : 2 * x + 2]
                torch.testing.assert_close(pooled[:, 0, z, y, x], cell.mean((1, 2, 3)))


def test_pooling_refuses_shapes_that_no_autoencoder_produces() -> None:
    with pytest.raises(
        ValueError, match=r"masks of 9 frames cannot be pooled to 4 latent frames, only to \[2, 3, 5, 9\]"
    ):
        pool_masks(torch.ones(1, 1, 9, 8, 8), (4, 2, 2))
    with pytest.raises(ValueError, match="cannot be pooled to 5 latent frames"):
        pool_masks(torch.ones(1, 1, 1, 8, 8), (5, 2, 2))
    with pytest.raises(ValueError, match=r"\[B, 1, F, H, W\]"):
        pool_masks(torch.ones(1, 9, 8, 8), (3, 2, 2))


# --- tracking -------------------------------------------------------------------------------


def smooth(side: int, seed: int) -> Tensor:
    """Returns a texture `[3, side, side]` with details about a tenth as wide as the texture."""
    coarse = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)[0].clamp(0, 1) * 2 - 1


def scene(side: int = 64) -> tuple[Tensor, Tensor]:
    """Returns 16 frames `[3, F, H, W]` of a textured ellipse, and the ellipse's masks `[1, F, H, W]`.

    The ellipse follows a wavy path across a background with a different texture.
    """
    ground, skin = smooth(side, 1), smooth(side, 2)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frames, masks = [], []
    for i in range(16):
        right, down = side // 4 + 2 * i, side // 2 + round(6 * float(np.sin(i / 3)))
        inside = ((x - right) / 11) ** 2 + ((y - down) / 8) ** 2 < 1
        frames.append(torch.where(inside, torch.roll(skin, (down, right), (1, 2)), ground))
        masks.append(inside[None].float())
    return torch.stack(frames, 1), torch.stack(masks, 1)


def overlap(a: Tensor, b: Tensor) -> list[float]:
    """Returns the intersection over union of two mask sequences `[1, F, H, W]`, one value per frame."""
    both, any_ = torch.minimum(a, b).sum((0, 2, 3)), torch.maximum(a, b).sum((0, 2, 3))
    return (both / any_).tolist()


@pytest.mark.parametrize("flow", ["dis", "farneback"])
def test_a_mask_is_tracked_through_a_clip(flow: str) -> None:
    frames, truth = scene()
    followed = Track.model_validate({"flow": flow}).follow(frames, truth[:, 0])
    assert followed.shape == truth.shape and torch.equal(followed[:, 0], truth[:, 0])
    assert set(followed.unique().tolist()) == {0.0, 1.0}
    assert min(overlap(followed, truth)) >= 0.8
    assert min(overlap(truth[:, :1].expand_as(truth), truth)) < 0.1  # a static mask would fail


def test_a_still_object_keeps_its_mask() -> None:
    frames, truth = scene()
    still = frames[:, :1].expand(-1, 4, -1, -1)
    assert min(overlap(Track().follow(still, truth[:, 0]), truth[:, :1].expand(-1, 4, -1, -1))) > 0.97


def test_a_mask_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be tracked"):
        Track().follow(torch.zeros(3, 4, 32, 32), torch.zeros(1, 16, 16))
