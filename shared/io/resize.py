"""Fits a picture and its mask to a size, either by cropping or by padding."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

from PIL import Image

from shared.io.decode import GROUND, Picture
from shared.io.terminal import encodable

ResizeMode = Literal["cover", "contain"]
_KEPT = 2 / 3  # a warning is issued if a crop keeps less than this share of a picture


def resize(
    picture: Picture,
    size: int | tuple[int, int],
    mode: ResizeMode | None = None,
    keep: tuple[int, int, int, int] | None = None,
) -> Picture:
    """Resizes a picture and its mask to `size` in pixels. The result is bit-for-bit deterministic.

    Args:
        size: a side length, or (height, width)
        mode: "cover" fills the frame and crops the rest. The crop is centred on the mask if there is one, and on the
            picture otherwise. A UserWarning is issued if the crop loses more than a third of the picture, unless the
            whole mask stays inside the crop. None is like "cover" but never warns. "contain" keeps the whole picture
            and pads it with a neutral colour; `Picture.valid` marks the area that is not padding
        keep: a box (left, top, right, bottom) that replaces the bounds of the mask, so that all frames of a clip are
            cropped alike
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"cannot fit a picture to {width}x{height} pixels")
    if mode == "contain":
        return _contain(picture, width, height)
    if mode not in ("cover", None):
        raise ValueError(f"unknown resize mode {mode!r}. Available: contain, cover.")
    full_w, full_h = picture.size
    scale = max(width / full_w, height / full_h)
    cut_w, cut_h = min(full_w, width / scale), min(full_h, height / scale)
    keep = keep or (picture.alpha.getbbox() if picture.alpha is not None else None)
    middle_x, middle_y = _middle(picture, keep)
    left = min(max(middle_x - cut_w / 2, 0.0), full_w - cut_w)
    top = min(max(middle_y - cut_h / 2, 0.0), full_h - cut_h)
    box = (left, top, min(left + cut_w, full_w), min(top + cut_h, full_h))
    if mode == "cover" and cut_w * cut_h < _KEPT * full_w * full_h and not _inside(keep, box):
        _warn_of_loss(picture, cut_w * cut_h / (full_w * full_h))
    return replace(
        picture,
        image=picture.image.resize((width, height), Image.Resampling.LANCZOS, box),
        alpha=picture.alpha and picture.alpha.resize((width, height), Image.Resampling.BILINEAR, box),
        real=picture.real and picture.real.resize((width, height), Image.Resampling.BILINEAR, box),
    )


def _inside(bounds: tuple[int, int, int, int] | None, box: tuple[float, float, float, float]) -> bool:
    """Whether the bounds exist and lie inside the box; both are (left, top, right, bottom)."""
    return (
        bounds is not None
        and all(b <= m for b, m in zip(box[:2], bounds[:2], strict=True))
        and all(b >= m for b, m in zip(box[2:], bounds[2:], strict=True))
    )


def _warn_of_loss(picture: Picture, kept: float) -> None:
    size = f"{picture.size[0]}x{picture.size[1]}"
    warnings.warn(
        encodable(f"{picture.path or 'a picture'} is {size}, and the crop loses {1 - kept:.0%} of it")
        + ": crop it yourself, give it a mask for the crop to follow, or set fit=contain in its source "
        "(sources.references.fit=contain, sources.clips.fit=contain) to keep all of it",
        UserWarning,
        stacklevel=1,  # always the same code location, so that identical warnings are shown once
    )


def _middle(picture: Picture, keep: tuple[int, int, int, int] | None) -> tuple[float, float]:
    """Returns (x, y), the centre of the area that must stay in the frame."""
    left, top, right, bottom = keep or (0, 0, *picture.size)
    return (left + right) / 2, (top + bottom) / 2


def _contain(picture: Picture, width: int, height: int) -> Picture:
    full_w, full_h = picture.size
    scale = min(width / full_w, height / full_h)
    inner = (max(1, min(width, round(full_w * scale))), max(1, min(height, round(full_h * scale))))
    corner = ((width - inner[0]) // 2, (height - inner[1]) // 2)

    def placed(layer: Image.Image, how: Image.Resampling, ground: tuple[int, int, int] | int) -> Image.Image:
        frame = Image.new(layer.mode, (width, height), ground)
        frame.paste(layer.resize(inner, how), corner)
        return frame

    linear = Image.Resampling.BILINEAR
    real = picture.real or Image.new("L", picture.size, 255)
    return replace(
        picture,
        image=placed(picture.image, Image.Resampling.LANCZOS, GROUND),
        alpha=picture.alpha and placed(picture.alpha, linear, 0),
        real=placed(real, linear, 0) if inner != (width, height) or picture.real is not None else None,
    )
