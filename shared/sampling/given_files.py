"""Reads the pictures and clips that the sampler starts from or keeps, and encodes them to latents of the sampled size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shared.backbones.protocol import Backbone
from shared.io.clips.clip_kinds import clip_kind
from shared.io.clips.open_frames import open_frames
from shared.io.clips.read_clip import Clip, read_clip
from shared.io.clips.window import ClipWindow
from shared.io.decode import read_picture
from shared.io.resize import resize
from shared.sources.to_example import load


def is_clip(path: Path) -> bool:
    """Returns whether a file or folder is a clip rather than a picture. Raises ValueError, naming the path, if it is
    neither."""
    if path.is_file() and path.stat().st_size and clip_kind(path) == "picture":
        return False
    open_frames(path)
    return True


def picture_latents(backbone: Backbone, path: Path, size: tuple[int, int]) -> Tensor:
    """Encodes a picture to latents [1, C, h, w], after scaling and cropping it to `size`, which is (height, width) in pixels.

    Raises ValueError, naming the path, if the picture cannot be read.
    """
    picture = resize(read_picture(path), size, "cover")
    return encoded(backbone, picture.pixels)


def masked_picture(path: Path, mask: Path, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns a picture ([3, H, W] in [-1, 1]) and its mask ([1, H, W] in [0, 1]), both scaled and cropped to `size`.
    Raises ValueError if the two files differ in size."""
    fitted = resize(load(path, mask), size, "cover")
    assert fitted.mask is not None
    return fitted.pixels, fitted.mask


def read_given(path: Path, frames: int, size: tuple[int, int], mask: Path | None = None) -> Clip:
    """Reads the first `frames` frames of a clip, scaled and cropped to `size`. Raises ValueError, naming the path, if the clip
    is shorter."""
    there = open_frames(path).count
    if there < frames:
        has = "1 frame" if there == 1 else f"{there} frames"
        raise ValueError(f"{path} has {has}, but {frames} are needed; generate fewer frames, or use a longer clip")
    return read_clip(path, ClipWindow(length=frames), size, "cover", mask)


@torch.no_grad()
def encoded(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Encodes pixels [3, (F), H, W] in [-1, 1] to latents [1, C, (f), h, w] in the sampler's precision."""
    given = pixels[None].to(backbone.device, backbone.dtype)
    with torch.autocast(given.device.type, enabled=False):  # the autoencoder keeps its loaded precision
        return backbone.encode_pixels(given).to(backbone.latent_dtype)
