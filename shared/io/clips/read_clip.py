"""Reads a clip into tensors at the working size.

Frames are read one by one, so memory use does not grow with the length of the clip.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from shared.config import expanded
from shared.io.clips.frame_source import FrameSource
from shared.io.clips.mask_frames import MaskFrames, open_masks
from shared.io.clips.open_frames import open_frames
from shared.io.clips.window import ClipWindow
from shared.io.decode import Picture
from shared.io.resize import ResizeMode, resize

PathLike = str | os.PathLike[str]
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Clip:
    """One window of a clip."""

    frames: Tensor  # [3, F, H, W] float32 in [-1, 1]
    # the subject, [1, F, H, W] in [0, 1]; [1, 1, H, W] if only the first frame's mask is known
    masks: Tensor | None
    valid: Tensor | None  # everything but padding, [1, F, H, W] in [0, 1]; None if there is no padding
    fps: float | None  # frames per second; None for a folder of frames without a known rate
    picks: tuple[int, ...]  # the indices of these F frames in the file
    path: Path


def read_clip(
    path: PathLike,
    window: ClipWindow | None = None,
    size: int | tuple[int, int] | None = None,
    fit: ResizeMode = "cover",
    mask: PathLike | None = None,
) -> Clip:
    """Reads the first window of a clip; see `read_windows`."""
    return next(read_windows(path, window, size, fit, mask))


def read_windows(
    path: PathLike,
    window: ClipWindow | None = None,
    size: int | tuple[int, int] | None = None,
    fit: ResizeMode = "cover",
    mask: PathLike | None = None,
) -> Iterator[Clip]:
    """Yields the windows of a clip (a video file, an animation or a folder of frames), each read on demand.

    Args:
        size: a side length, or (height, width), in pixels. None keeps the clip's own size
        fit: as in `shared.io.resize.resize`. All frames of a window are cropped alike, around the centre of the box
            that contains all of the window's masks
        mask: a clip or folder with a mask for each frame, or one picture for the first frame (see `find_clips`). If
            None, the transparency of the frames is the mask, as for pictures. The subject may be absent from some
            frames of a window, but not from all of them

    Raises:
        ValueError: naming the file, if it is not a clip, if it is damaged, truncated or shorter than a window, or if
            its frames and masks do not match
    """
    window = window or ClipWindow()
    source = open_frames(path)
    masks = None if mask is None else open_masks(expanded(mask), source)
    for picks in window.picks(source):
        yield _read(source, picks, masks, size, fit, window.rate(source, picks))


def _read(
    source: FrameSource,
    picks: tuple[int, ...],
    masks: MaskFrames | None,
    size: int | tuple[int, int] | None,
    fit: ResizeMode,
    fps: float | None,
) -> Clip:
    width, height = source.size if size is None else (size, size) if isinstance(size, int) else (size[1], size[0])
    indices = sorted(set(picks))
    keep = _where_masks_are(source, indices, masks) if fit == "cover" and _is_cut(source.size, width, height) else None
    pixels: list[Tensor] = []
    planes: list[Tensor] = []
    seen = False
    valid = None
    for number, picture in enumerate(_with_masks(source, indices, masks)):
        how = fit if fit == "contain" or number == 0 else None  # warn only once about what the crop loses
        square = picture if picture.size == (width, height) else resize(picture, (height, width), how, keep)
        pixels.append(square.pixels)
        seen |= picture.alpha is not None
        planes.append(torch.ones(1, height, width) if square.mask is None else square.mask)
        valid = square.valid
    return Clip(
        frames=_spread(pixels, indices, picks),
        masks=_masks_of(source, masks, planes if seen else [], indices, picks),
        valid=None if valid is None else valid[:, None].expand(-1, len(picks), -1, -1),
        fps=fps,
        picks=picks,
        path=source.path,
    )


def _masks_of(
    source: FrameSource, given: MaskFrames | None, planes: list[Tensor], indices: Sequence[int], picks: tuple[int, ...]
) -> Tensor | None:
    if not planes:
        return None
    if not any(bool(plane.any()) for plane in planes):
        raise ValueError(
            f"{given.path if given else source.path}: after cropping, the masks are black in every frame used, but the "
            "region must be marked in white. In a recipe, another window or fit=contain may help"
        )
    return planes[0][:, None] if given is not None and given.first_only else _spread(planes, indices, picks)


def _spread(planes: list[Tensor], indices: Sequence[int], picks: tuple[int, ...]) -> Tensor:
    """Stacks planes (one [C, H, W] per index) into a tensor [C, F, H, W] with one frame per pick. Picks may repeat."""
    place = {index: i for i, index in enumerate(indices)}
    out = torch.empty(planes[0].shape[0], len(picks), *planes[0].shape[1:])
    for frame, index in enumerate(picks):
        out[:, frame] = planes[place[index]]
    return out


def _with_masks(source: FrameSource, indices: Sequence[int], masks: MaskFrames | None) -> Iterator[Picture]:
    if masks is None:
        yield from source.frames(indices)
        return
    for picture, alpha in zip(source.frames(indices), masks.masks(indices), strict=True):
        yield Picture(picture.image, alpha, picture.real, picture.path)


def _is_cut(size: tuple[int, int], width: int, height: int) -> bool:
    return size[0] * height != size[1] * width


def _where_masks_are(source: FrameSource, indices: Sequence[int], masks: MaskFrames | None) -> Box | None:
    """Returns the smallest box around all masks of a window, or None if there are no masks or all of them are empty."""
    if masks is not None:
        planes: Iterator[Image.Image | None] = masks.masks(indices)
    elif source.may_be_transparent:
        planes = (picture.alpha for picture in source.frames(indices))
    else:
        return None
    found = list(_boxes(planes, source.size))
    if not found:
        return None
    lefts, tops, rights, bottoms = zip(*found, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _boxes(planes: Iterator[Image.Image | None], size: tuple[int, int]) -> Iterator[Box]:
    """Yields the bounds of each mask and skips empty masks. For a frame without a mask, yields the whole frame."""
    for plane in planes:
        box = (0, 0, *size) if plane is None else plane.getbbox()
        if box is not None:
            yield box
