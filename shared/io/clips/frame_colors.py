"""Converts decoded video frames to 8-bit sRGB.

The conversion uses the colour matrix and range that the video states, rounds instead of truncating, and tone-maps HDR.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

_BT709, _UNSPECIFIED, _BT601, _BT2020, _BT2020_CONSTANT = 1, 2, 5, 9, 10  # ITU-T H.273, matrix coefficients
_PRIMARIES_2020 = 9
_PQ, _HLG = 16, 18  # H.273, transfer characteristics
_HD = 720  # lines; as in video players, a video of at least this height that states no matrix counts as BT.709
_WHITE = 203.0  # nits of diffuse white, ITU-R BT.2408
_KNEE = 0.75  # as a fraction of diffuse white; anything darker keeps its brightness
_ROWS = 128  # rows converted in float at a time
# Linear BT.2020 to linear BT.709, ITU-R BT.2087
_TO_709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], dtype=np.float32
)
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)


def to_image(frame: Any) -> Image.Image:
    """Returns a PyAV frame as an RGB image, or RGBA if its format has transparency. The rotation stated in the
    file is not applied."""
    has_alpha = any(component.is_alpha for component in frame.format.components)
    deep = max(component.bits for component in frame.format.components) > 8
    wide = frame.color_trc in (_PQ, _HLG) or frame.color_primaries == _PRIMARIES_2020
    pixel_format = ("rgba64le" if has_alpha else "rgb48le") if deep or wide else ("rgba" if has_alpha else "rgb24")
    # bicubic chroma at full horizontal resolution and accurate rounding: without them, swscale takes fast paths that
    # are off by several levels
    values = frame.reformat(
        format=pixel_format, src_colorspace=_matrix(frame), interpolation=_INTERPOLATION
    ).to_ndarray()
    if values.dtype == np.uint8:
        return Image.fromarray(values)
    one = 65535 if frame.format.is_rgb else 255 << 8  # the largest value that swscale's conversion from YCbCr produces
    out = np.empty(values.shape, np.uint8)
    for top in range(0, len(values), _ROWS):
        rows = np.minimum(values[top : top + _ROWS].astype(np.float32) / one, 1)
        if wide:
            rows[..., :3] = _to_srgb(rows[..., :3], frame.color_trc)
        out[top : top + _ROWS] = np.floor(rows * 255.0 + 0.5)
    return Image.fromarray(out)


_INTERPOLATION = 0x4 | 0x2000 | 0x40000  # SWS_BICUBIC, SWS_FULL_CHR_H_INT, SWS_ACCURATE_RND


def _matrix(frame: Any) -> int:
    """Returns the H.273 number of the YCbCr-to-RGB matrix, as `reformat` takes it."""
    stated = int(frame.colorspace)
    if stated == _BT2020_CONSTANT:
        return _BT2020
    if stated in (0, _UNSPECIFIED):
        return _BT709 if frame.height >= _HD else _BT601
    return stated


def _to_srgb(code: np.ndarray, transfer: int) -> np.ndarray:
    """Converts BT.2020 code values [H, W, 3] in [0, 1] to sRGB.

    For HDR (PQ, SMPTE ST 2084; HLG, ITU-R BT.2100), brightness is kept up to three quarters of diffuse white and is
    then compressed smoothly towards sRGB's maximum. For other videos, only the primaries change.
    """
    if transfer not in (_PQ, _HLG):
        return np.clip((code**2.4) @ _TO_709.T, 0, 1) ** (1 / 2.4)  # ITU-R BT.1886
    light = np.clip((_pq(code) if transfer == _PQ else _hlg(code)) / _WHITE @ _TO_709.T, 0, None)
    peak = np.maximum(light.max(-1, keepdims=True), 1e-6)
    rolled = np.where(peak <= _KNEE, peak, _KNEE + (1 - _KNEE) * (1 - np.exp(-(peak - _KNEE) / (1 - _KNEE))))
    light = np.clip(light * (rolled / peak), 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)  # IEC 61966-2-1


def _pq(code: np.ndarray) -> np.ndarray:
    """Converts PQ code values to nits (SMPTE ST 2084)."""
    power = code ** np.float32(32 / 2523)
    return 10000 * (np.clip(power - 0.8359375, 0, None) / (18.8515625 - 18.6875 * power)) ** np.float32(16384 / 2610)


def _hlg(code: np.ndarray) -> np.ndarray:
    """Converts HLG code values to nits on a 1000-nit display, with the inverse OETF and the OOTF of ITU-R BT.2100
    (gamma 1.2)."""
    scene = np.where(code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    luminance = np.maximum(scene @ _LUMA_2020, 1e-6)[..., None]
    return 1000 * luminance**0.2 * scene
