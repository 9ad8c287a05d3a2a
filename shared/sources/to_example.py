"""Turns picture files into examples. All sources that read pictures share this code."""

from __future__ import annotations

from pathlib import Path

from shared.io.decode import Picture, read_mask, read_picture
from shared.io.resize import ResizeMode, resize
from shared.types import Example, Role


def load(path: Path, mask: Path | None) -> Picture:
    """Reads a picture and its mask, if there is one. Raises ValueError if the two differ in size."""
    picture = read_picture(path)
    if mask is None:
        return picture
    alpha = read_mask(mask)
    if alpha.size != picture.size:
        sizes = f"{alpha.width}x{alpha.height} pixels, but its picture {path} is {picture.size[0]}x{picture.size[1]}"
        raise ValueError(f"the mask {mask} is {sizes}; both must have the same size")
    return Picture(picture.image, alpha, path=path)


def example(picture: Picture, owner: str, role: Role, resolution: int, how: ResizeMode, caption: str) -> Example:
    """Makes one square example. Raises ValueError if the mask is completely cropped away."""
    square = resize(picture, resolution, how)
    if square.alpha is not None and square.alpha.getextrema() == (0, 0):
        raise ValueError(f"{picture.path}: no part of its mask is inside the square crop; use fit=contain")
    return Example(
        pixels=square.pixels,
        caption=caption,
        owners=(owner,),
        role=role,
        masks={} if square.mask is None else {owner: square.mask},
        valid=square.valid,
        source=str(picture.path),
        user_caption=bool(caption),
    )
