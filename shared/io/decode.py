"""Decodes a picture file to 8-bit sRGB and, if it has transparency, a mask. The size is checked before decoding."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageFile, features
from torch import Tensor

from shared.config import expanded
from shared.io.failures import of_the_machine, reading
from shared.io.find_pictures import sniff
from shared.io.terminal import encodable

# The maximum width * height at 8 bits per channel. Decoding and resizing use 32-bit values and then take up to 1.7 GB.
MAX_PIXELS = 64_000_000
_DEEP = 2  # deeper channels take twice the memory, because they are converted to 8 bits via 64-bit values
MIN_SIDE = 16  # pixels
_DARK = 16  # of 255; 12-bit values that are read as 16-bit values are darker than this
_WHITE, _DEEP_COLOUR = "pcs_white", "pcs_deep_colour"  # keys of the values that `_decode` adds to `Image.info`
_STRETCH = "If that is wrong, save the picture with values up to 65535"
GROUND = (128, 128, 128)  # the colour of transparent areas and of padding

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_PROFILE_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}  # by the colour space in the profile's header


@dataclass(frozen=True)
class Picture:
    """One decoded, upright picture in 8-bit sRGB, with masks of its pixels."""

    image: Image.Image  # mode RGB
    alpha: Image.Image | None = None  # mode L: 255 where the subject is
    real: Image.Image | None = None  # mode L: 255 on the picture, 0 on padding; None if there is no padding
    path: Path | None = None
    deep: bool = False  # whether the file has 16-bit colour channels, of which only the upper 8 bits are read

    @property
    def size(self) -> tuple[int, int]:
        """The width and height in pixels."""
        return self.image.size

    @property
    def pixels(self) -> Tensor:
        """The picture as a float32 tensor [3, H, W] in [-1, 1]."""
        return to_pixels(self.image)

    @property
    def mask(self) -> Tensor | None:
        """The mask of the subject as a float32 tensor [1, H, W] in [0, 1]; None if it is unknown."""
        return None if self.alpha is None else _plane(self.alpha)

    @property
    def valid(self) -> Tensor | None:
        """The mask of everything but padding, as a float32 tensor [1, H, W] in [0, 1]; None if there is no padding."""
        return None if self.real is None else _plane(self.real)


def read_picture(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> Picture:
    """Decodes a picture file, whatever its extension, to an upright picture in 8-bit sRGB.

    Transparency becomes the mask, and transparent areas are filled with a neutral colour. Only the first frame of an
    animation is used, and a UserWarning is issued.

    Raises ValueError, naming the file, if it is missing, not a picture, damaged, larger than `max_pixels` (checked
    before anything is decoded) or fully transparent, or if one of its sides is shorter than `min_side`.
    """
    picture = read_frame(path, max_pixels, min_side)
    brightest = max(int(high) for _, high in picture.image.getextrema())  # type: ignore[misc]
    if picture.deep and brightest < _DARK:
        warnings.warn(
            encodable(f"{picture.path} is almost black: its 16-bit channels reach only {brightest} of 255. {_STRETCH}"),
            stacklevel=2,
        )
    if picture.alpha is not None and picture.alpha.getextrema() == (0, 0):
        raise ValueError(f"{picture.path} is fully transparent: there is nothing to learn from it")
    return picture


def read_frame(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> Picture:
    """Like `read_picture`, but for a frame of a clip.

    A fully transparent frame is accepted, and an almost black one causes no warning.
    """
    path = expanded(path)
    return as_picture(_decode(path, max_pixels, min_side), path)


def as_picture(image: Image.Image, path: Path) -> Picture:
    """Converts a decoded, upright image of any mode to 8-bit sRGB.

    Transparency becomes the mask, and transparent areas are filled with a neutral colour. `path` is the image's file.
    """
    with named_errors(path):
        profile = image.info.get("icc_profile")
        colour, alpha = _split(image, path)
        rgb, deep = _to_srgb(colour, profile, path), bool(image.info.get(_DEEP_COLOUR))
        if alpha is None or alpha.getextrema() == (255, 255):
            return Picture(rgb, path=path, deep=deep)
        whole = Image.composite(rgb, Image.new("RGB", rgb.size, GROUND), alpha)
        return Picture(whole, alpha, path=path, deep=deep)


def read_mask(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads a mask file as an image of mode L, in which bright pixels mark the subject.

    The mask is the file's alpha channel if it has transparency, otherwise its brightness. A mask with only two values
    (0 and 1, or two label colours) becomes black and white. Raises ValueError as `read_picture` does, and if the mask
    marks nothing.
    """
    path = expanded(path)
    image = _decode(path, max_pixels, 1)
    with named_errors(path):
        colour, alpha = _split(image, path)
        grey = colour.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha
    if grey.getextrema() == (0, 0):
        raise ValueError(f"the mask {path} is empty: it marks no pixels")
    return two_valued(grey)


def two_valued(mask: Image.Image) -> Image.Image:
    """Returns a mask of mode L, stretched to black and white if it has at most two values.

    An empty mask stays empty.
    """
    values = np.asarray(mask)
    levels = np.unique(values)
    if len(levels) <= 2 and levels[-1] > 0:
        return Image.fromarray(np.where(values == levels[-1], 255, 0).astype(np.uint8))
    return mask


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Reads the width and height of the upright picture from the file's header.

    Raises ValueError if the header is unreadable.
    """
    path = expanded(path)
    with opened(path) as image:
        turned = image.format != "TIFF" and _orientation(image) >= 5  # Pillow turns TIFFs itself
        return (image.height, image.width) if turned else image.size


def to_pixels(image: Image.Image) -> Tensor:
    """Converts an RGB image to a float32 tensor [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(127.5).sub_(1.0).contiguous()


def _plane(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).unsqueeze(0).float().div_(255.0)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns any error in its block, except failures of the machine, into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # decoders can raise anything on hostile data
        if of_the_machine(error) or (isinstance(error, ValueError) and str(path) in str(error)):
            raise
        what = f"{error}".strip() or type(error).__name__
        raise ValueError(f"{path} cannot be read as a picture; it is damaged or truncated: {what}") from None


@contextmanager
def opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """Opens a picture file and reads its header.

    Unlike Image.open, this tries only one format and does not limit the size.
    """
    with reading(path):
        kind = sniff(path)
    if kind is None:
        raise ValueError(f"{path} is not a picture in a supported format: save it as PNG or JPEG")
    Image.init()
    factory = Image.OPEN[kind][0] if kind in Image.OPEN else None
    if factory is None:
        raise ValueError(f"{path} is {kind}, which this Pillow cannot read: save it as JPEG or PNG")
    with named_errors(path), path.open("rb") as stream:
        yield factory(stream, str(path))  # type: ignore[misc]


def check_size(path: Path, size: tuple[int, int], max_pixels: int = MAX_PIXELS, min_side: int = MIN_SIDE) -> None:
    """Raises ValueError, naming the file, if `size` (width, height) is too large to decode or too small to show anything."""
    width, height = size
    if width * height > max_pixels:
        total = f"{width}x{height} = {width * height:,} pixels"
        raise ValueError(f"{path} is {total}, above the limit of {max_pixels:,}: make it smaller")
    if min(width, height) < min_side:
        raise ValueError(f"{path} is {width}x{height} pixels: each side must be at least {min_side}")


def _decode(path: Path, max_pixels: int, min_side: int) -> Image.Image:
    """Returns the first frame, decoded and upright, in the file's own mode."""
    with opened(path) as image:
        deep = image.mode.startswith(("I", "F"))
        check_size(path, image.size, max_pixels // (_DEEP if deep else 1), min_side)
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":
            warnings.warn(encodable(f"{path} has {frames} frames: only the first is used"), UserWarning, stacklevel=1)
        image.seek(0)
        info = {_WHITE: _stated_white(image), _DEEP_COLOUR: not deep and ";16" in str(image.tile)}
        image.load()
        turn = _TURNS.get(_orientation(image))
        upright = image.transpose(turn) if turn is not None else image.copy()
        upright.info = {**image.info, **info}
        return upright


def _stated_white(image: Image.Image) -> int | None:
    """Returns the grey value that a TIFF states for white. This is its MaxSampleValue (tag 281) or, without one, the
    largest value that fits in its BitsPerSample (tag 258), if that is 9 to 15. Otherwise, returns None."""
    tags = getattr(image, "tag_v2", {})
    most, bits = (next(iter(v), None) if isinstance(v := tags.get(tag), tuple) else v for tag in (281, 258))
    if isinstance(most, int) and most > 0:
        return most
    return 2**bits - 1 if isinstance(bits, int) and 8 < bits < 16 else None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception as error:  # damaged EXIF data is no reason to reject the picture
        if of_the_machine(error):
            raise
        return 1


def _split(image: Image.Image, path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Splits a decoded picture into colour (mode L, RGB or CMYK) and transparency (mode L)."""
    if image.mode.startswith(("I", "F")):
        return _grey(image, path)
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.mode in ("RGBA", "RGBa", "La", "PA") or "transparency" in image.info:
        whole = image.convert("RGBA")
        return whole.convert("RGB"), whole.getchannel("A")
    return (image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")), None


def _grey(image: Image.Image, path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Converts 16-bit, 32-bit and float grey values to 8 bits, so that white becomes 255.

    Pillow would clip larger values to white instead.

    The file may state which value is white. If it does not, integers up to 255 are assumed to be 8-bit values in a
    wider type, as written by scientific software. Integers up to 4095 are assumed to be 12-bit values, because they
    would look black as 16-bit values; a UserWarning is issued.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} has grey values that are not finite (NaN or infinity): save it with 8 or 16 bits")
    low, high = float(values.min()), float(values.max())
    top = _white(image, values, high, path)
    if not (low >= 0.0 and high <= top):
        raise ValueError(
            f"{path} has grey values from {low:g} to {high:g}, expected 0 to {top:g}: save it with 8 or 16 bits"
        )
    grey = Image.fromarray(np.floor(values / top * 255.0 + 0.5).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey, None
    return grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))


def _white(image: Image.Image, values: np.ndarray, high: float, path: Path) -> float:
    """Returns the grey value that represents white."""
    stated = image.info.get(_WHITE)
    if isinstance(stated, int) and high <= stated and image.mode != "F":
        return float(stated)
    if high <= 255.0 and (image.mode != "F" or (high > 1.0 and bool((values == np.floor(values)).all()))):
        return 255.0
    if image.mode == "F":
        return 1.0
    top = 4095.0 if high <= 4095.0 else 65535.0
    if high <= 16383.0:
        then = ", so they are read as 12-bit values" if top == 4095.0 else ", which is dark"
        said = f"{path}: its grey values reach only {high:g} of 65535{then}"
        warnings.warn(encodable(f"{said}. {_STRETCH}"), stacklevel=5)
    return top


def _to_srgb(image: Image.Image, icc: bytes | None, path: Path) -> Image.Image:
    """Converts a picture to mode RGB in sRGB, using its embedded colour profile if the profile's colour space matches
    the picture's mode."""
    if icc and features.check("littlecms2"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            known = "sRGB" in ImageCms.getProfileDescription(profile)
            if _PROFILE_MODES.get(icc[16:20]) == image.mode and not known:
                out = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert out is not None
                return out
        except (ImageCms.PyCMSError, OSError) as error:
            warnings.warn(
                encodable(f"{path}: its colour profile cannot be read; colours are used as stored ({error})"),
                stacklevel=6,
            )
    return image if image.mode == "RGB" else image.convert("RGB")
