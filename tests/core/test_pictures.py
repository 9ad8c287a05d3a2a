"""Tests that pictures and masks are read correctly from real files in every supported format."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from shared.io.decode import picture_size, read_mask, read_picture
from shared.io.find_pictures import list_pictures
from tests.core.scenes import levels, save, scene

LOSSLESS: dict[str, dict[str, Any]] = {"webp": {"lossless": True, "exact": True}}


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, color: int, rows: bytes, *extra: bytes) -> bytes:
    """Assembles a PNG by hand."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    body = b"".join(extra) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


# --- reading --------------------------------------------------------------------------------


def test_plain_rgb_is_read_exactly(tmp_path: Path) -> None:
    picture = read_picture(save(tmp_path / "a.png", scene()))
    assert picture.size == (48, 32) and picture.mask is None and picture.valid is None
    assert picture.pixels.shape == (3, 32, 48) and picture.pixels.dtype == torch.float32
    assert picture.pixels.min() >= -1 and picture.pixels.max() <= 1
    np.testing.assert_allclose(levels(tmp_path / "a.png"), scene(), atol=1e-4)


# how a viewer transforms the stored pixels for each EXIF orientation, written in NumPy to be independent of Pillow
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "jpg"])
def test_the_exif_orientation_is_applied(tmp_path: Path, orientation: int, ending: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(ending, {})
    path = save(tmp_path / f"a.{ending}", scene(), exif=exif, **options)
    expected = UPRIGHT[orientation](scene())
    assert picture_size(path) == expected.shape[1::-1]
    np.testing.assert_allclose(levels(path), expected, atol=8 if ending == "jpg" else 1e-4)


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", scene(), exif=b"Exif\0\0II*\0garbage")
    assert read_picture(tmp_path / "a.jpg").size == (48, 32)


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_16_bit_grey_is_divided_by_257(tmp_path: Path, ending: str) -> None:
    grey = np.linspace(0, 65535, 48 * 32).astype(np.uint16).reshape(32, 48)
    path = tmp_path / f"a.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 48 32 65535\n" + grey.astype(">u2").tobytes())
    else:
        save(path, grey)
    got = levels(path)
    np.testing.assert_allclose(got[..., 0], grey / 257, atol=0.501)
    assert got[0, 0, 0] == 0 and got[-1, -1, 0] == 255 and len(np.unique(got)) == 256


def test_16_bit_colour_and_16_bit_grey_with_alpha_are_read(tmp_path: Path) -> None:
    deep = (scene().astype(np.uint16) * 257).astype(">u2")
    (tmp_path / "rgb.png").write_bytes(png(48, 32, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)))
    np.testing.assert_allclose(levels(tmp_path / "rgb.png"), scene(), atol=1e-4)
    alpha = np.zeros((32, 48), np.uint16)
    alpha[:, :20] = 65535
    both = np.stack([deep[..., 0], alpha.astype(">u2")], -1)
    (tmp_path / "la.png").write_bytes(png(48, 32, 16, 4, b"".join(b"\0" + row.tobytes() for row in both)))
    picture = read_picture(tmp_path / "la.png")
    assert picture.mask is not None and picture.mask[0, :, :20].min() == 1 and picture.mask[0, :, 20:].max() == 0
    np.testing.assert_allclose(levels(tmp_path / "la.png")[:, :20, 0], scene()[:, :20, 0], atol=1e-4)


def test_float_and_32_bit_grey_are_scaled_to_8_bits(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 48 * 32, dtype=np.float32).reshape(32, 48)
    np.testing.assert_allclose(levels(save(tmp_path / "f.tiff", values))[..., 1], values * 255, atol=0.501)
    save(tmp_path / "far.tiff", values * 1000)
    with pytest.raises(ValueError, match=r"far\.tiff has grey values from 0 to 1000, expected 0 to 1: save it with 8"):
        read_picture(tmp_path / "far.tiff")
    save(tmp_path / "nan.tiff", np.where(values > 0.5, np.nan, values))
    with pytest.raises(ValueError, match=r"nan\.tiff has grey values that are not finite"):
        read_picture(tmp_path / "nan.tiff")
    np.testing.assert_allclose(
        levels(save(tmp_path / "i.tiff", (values * 65535).astype(np.int32)))[..., 1], values * 255, atol=0.6
    )


def test_12_bit_grey_stored_in_16_bits_is_not_read_as_black(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    grey = np.linspace(0, 4095, 48 * 32).astype(np.uint16).reshape(32, 48)
    for top, about in ((4095, ""), (4095, "stated"), (16383, "stated")):  # tag 281: MaxSampleValue
        path = save(tmp_path / f"{top}{about}.tiff", grey, **({"tiffinfo": {281: top}} if about else {}))
        np.testing.assert_allclose(levels(path)[..., 0], grey / top * 255, atol=0.501)
        said = [str(w.message) for w in recwarn.list]
        recwarn.clear()
        assert bool(said) is not bool(about), "only a file that does not state its white level causes a warning"
        assert about or (
            "reach only 4095 of 65535, so they are read as 12-bit values" in said[0] and str(path) in said[0]
        )
    np.testing.assert_allclose(levels(save(tmp_path / "dim.png", grey * 4))[..., 0], grey * 4 / 257, atol=0.501)
    assert "reach only 16380 of 65535, which is dark" in str(recwarn.pop(UserWarning).message)


def test_12_bit_colour_stored_in_16_bits_causes_a_warning(tmp_path: Path) -> None:
    deep = (scene().astype(np.uint16) * 16).astype(">u2")
    (tmp_path / "rgb.png").write_bytes(png(48, 32, 16, 2, b"".join(b"\0" + row.tobytes() for row in deep)))
    with pytest.warns(UserWarning, match=r"rgb\.png is almost black: its 16-bit channels reach only \d+ of 255"):
        read_picture(tmp_path / "rgb.png")


def test_palette_pictures_are_read_with_and_without_transparency(tmp_path: Path) -> None:
    flat = np.zeros((32, 48), np.uint8)
    flat[:, 24:] = 1
    image = Image.frombytes("P", (48, 32), flat.tobytes())
    image.putpalette([10, 200, 30, 250, 20, 40])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    image.save(tmp_path / "half.png", transparency=bytes([128, 255]))
    image.save(tmp_path / "clear.gif", transparency=0)
    plain = levels(tmp_path / "plain.png")
    np.testing.assert_allclose(plain[0, 0], (10, 200, 30), atol=1e-4)
    np.testing.assert_allclose(plain[0, 40], (250, 20, 40), atol=1e-4)
    for name in ("clear.png", "clear.gif"):
        picture = read_picture(tmp_path / name)
        assert picture.mask is not None
        assert picture.mask[0, :, :24].max() == 0 and picture.mask[0, :, 24:].min() == 1
        np.testing.assert_allclose(levels(tmp_path / name)[0, 0], 128, atol=1e-4)
        np.testing.assert_allclose(levels(tmp_path / name)[0, 40], (250, 20, 40), atol=1e-4)
    half = read_picture(tmp_path / "half.png")
    assert half.mask is not None and half.mask[0, 0, 0] == pytest.approx(128 / 255)


@pytest.mark.parametrize("kind", [np.int32, np.uint16, np.float32])
def test_8_bit_values_stored_in_a_wider_type_are_not_read_as_black(tmp_path: Path, kind: type) -> None:
    values = np.linspace(0, 255, 64 * 64).round().reshape(64, 64).astype(kind)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    picture = np.asarray(read_picture(tmp_path / "a.tiff").image)
    assert np.array_equal(picture[..., 0], values.astype(np.uint8))


def test_deep_pixels_count_more_against_the_limit(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 40), np.int32)).save(tmp_path / "a.tiff")
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(tmp_path / "b.tiff")
    assert read_picture(tmp_path / "b.tiff", max_pixels=2000).size == (40, 40)
    with pytest.raises(ValueError, match="40x40 = 1,600 pixels, above the limit of 1,000"):
        read_picture(tmp_path / "a.tiff", max_pixels=2000)


@pytest.mark.parametrize(("mode", "ending"), [(m, e) for m in ("RGBA", "LA") for e in ("png", "tiff", "webp")][:-1])
def test_transparency_becomes_a_mask_and_transparent_pixels_become_grey(tmp_path: Path, mode: str, ending: str) -> None:
    alpha = np.full((32, 48), 255, np.uint8)
    alpha[:, 30:] = 0
    image = Image.fromarray(scene()).convert(mode)
    image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / f"a.{ending}", **LOSSLESS.get(ending, {}))
    picture = read_picture(tmp_path / f"a.{ending}")
    assert picture.mask is not None and picture.mask.shape == (1, 32, 48)
    np.testing.assert_array_equal(picture.mask[0].numpy(), alpha / 255)
    got = levels(tmp_path / f"a.{ending}")
    np.testing.assert_allclose(got[:, 30:], 128, atol=1e-4)
    expected = np.asarray(Image.fromarray(scene()).convert(mode).convert("RGB"))
    np.testing.assert_allclose(got[:, :30], expected[:, :30], atol=1e-4)


def test_opaque_alpha_is_not_a_mask_and_fully_transparent_pictures_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(scene()).convert("RGBA")
    image.save(tmp_path / "opaque.png")
    assert read_picture(tmp_path / "opaque.png").mask is None
    image.putalpha(0)
    image.save(tmp_path / "clear.png")
    with pytest.raises(ValueError, match=r"clear\.png is fully transparent"):
        read_picture(tmp_path / "clear.png")


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_becomes_a_mask(tmp_path: Path, bits: int) -> None:
    """A PNG can declare one colour or grey level transparent (tRNS)."""
    grey = np.arange(32 * 48).reshape(32, 48) % 200
    deep = (grey * 257).astype(">u2") if bits == 16 else grey.astype(np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    key = chunk(b"tRNS", struct.pack(">H", 7 * 257 if bits == 16 else 7))
    (tmp_path / "a.png").write_bytes(png(48, 32, bits, 0, rows, key))
    picture = read_picture(tmp_path / "a.png")
    assert picture.mask is not None
    np.testing.assert_array_equal(picture.mask[0].numpy(), grey != 7)
    rgb = scene().astype(np.uint16) * (257 if bits == 16 else 1)
    packed = rgb.astype(">u2" if bits == 16 else np.uint8)
    value = tuple(int(v) for v in rgb[0, 0])
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    (tmp_path / "b.png").write_bytes(png(48, 32, bits, 2, rows, chunk(b"tRNS", struct.pack(">HHH", *value))))
    mask = read_picture(tmp_path / "b.png").mask
    assert mask is not None and mask[0, :8, :8].max() == 0 and mask[0, 8:, 8:].min() == 1


def test_one_bit_bmp_ppm_and_jpeg_2000_pictures_are_read(tmp_path: Path) -> None:
    flat = np.zeros((32, 48), bool)
    flat[4:9] = True
    for ending in ("png", "bmp", "pbm", "tiff"):
        Image.fromarray(flat).save(tmp_path / f"a.{ending}")
        np.testing.assert_allclose(levels(tmp_path / f"a.{ending}")[..., 0], flat * 255, atol=1e-4)
    for ending in ("bmp", "ppm", "jp2"):
        options = {"irreversible": False} if ending == "jp2" else {}
        np.testing.assert_allclose(levels(save(tmp_path / f"c.{ending}", scene(), **options)), scene(), atol=1e-4)


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    """Pillow inverts CMYK in a JPEG, as Adobe does, but not in a TIFF. Orange must stay orange in both."""
    flat = np.zeros((32, 48, 3), np.uint8) + np.array([240, 120, 20], np.uint8)
    image = Image.fromarray(flat).convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=98)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()[:4000]
    np.testing.assert_allclose(levels(tmp_path / "a.jpg"), flat, atol=4)
    image.save(tmp_path / "a.tiff")
    np.testing.assert_allclose(levels(tmp_path / "a.tiff"), flat, atol=1)


def test_ycck_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    """Photoshop stores the inverted colours as YCbCr, and K as brightness. The transform in the Adobe marker is 2."""
    ycc = Image.fromarray(np.zeros((32, 48, 3), np.uint8) + np.array([15, 135, 235], np.uint8)).convert("YCbCr")
    planes = [*ycc.split(), Image.new("L", ycc.size, 255)]
    Image.merge("CMYK", [p.point(lambda v: 255 - v) for p in planes]).save(tmp_path / "a.jpg", quality=98)
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    marker = data.index(b"Adobe")
    data[marker + 11] = 2  # YCCK
    (tmp_path / "a.jpg").write_bytes(bytes(data))
    np.testing.assert_allclose(levels(tmp_path / "a.jpg")[5, 5], (240, 120, 20), atol=6)


@pytest.mark.skipif(not features.check("littlecms2"), reason="this Pillow has no colour management")
def test_colour_profiles_are_applied(tmp_path: Path) -> None:
    lab = Image.new("RGB", (32, 32), (200, 60, 60))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab.save(tmp_path / "srgb.png", icc_profile=srgb)
    np.testing.assert_allclose(levels(tmp_path / "srgb.png")[0, 0], (200, 60, 60), atol=1e-4)
    # the same profile under another name, with the red and blue primaries swapped; red must become blue
    swapped = bytearray(srgb.replace(b"sRGB", b"test").replace(b"s\0R\0G\0B", b"t\0e\0s\0t"))
    red, blue = swapped.index(b"rXYZ", 128), swapped.index(b"bXYZ", 128)
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    lab.save(tmp_path / "swapped.png", icc_profile=bytes(swapped))
    got = levels(tmp_path / "swapped.png")[0, 0]
    np.testing.assert_allclose(got, (60, 60, 200), atol=3)
    lab.save(tmp_path / "bad.png", icc_profile=b"nonsense" * 40)
    with pytest.warns(UserWarning, match=r"bad\.png: its colour profile cannot be read"):
        np.testing.assert_allclose(levels(tmp_path / "bad.png")[0, 0], (200, 60, 60), atol=1e-4)


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_only_the_first_frame_of_an_animation_is_read_and_a_warning_says_so(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (32, 32), c) for c in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **LOSSLESS.get(ending, {}))
    with pytest.warns(UserWarning, match=rf"a\.{ending} has 3 frames: only the first is used"):
        picture = read_picture(tmp_path / f"a.{ending}")
    assert picture.pixels[:, 3, 3].tolist() == [1, -1, -1]


def test_an_mpo_file_with_a_second_picture_is_not_treated_as_an_animation(tmp_path: Path) -> None:
    """In the MPO files that phones write, a JPEG is followed by a preview or by the picture for the other eye."""
    other = Image.new("RGB", (24, 24))
    Image.fromarray(scene()).save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[other])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_picture(tmp_path / "a.jpg").size == (48, 32)


def test_the_format_is_determined_by_a_files_contents_and_not_by_its_name(tmp_path: Path) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_allclose(levels(tmp_path / "a.jpg"), scene(), atol=1e-4)
    assert list_pictures(tmp_path)[0] == (tmp_path / "a.jpg",)


# --- refused files --------------------------------------------------------------------------------


def test_huge_pictures_are_refused_before_decoding(tmp_path: Path) -> None:
    (tmp_path / "big.png").write_bytes(png(30_000, 30_000, 8, 2, b"\0" * 1000))
    with pytest.raises(
        ValueError, match=r"big\.png is 30000x30000 = 900,000,000 pixels, above the limit of 64,000,000"
    ):
        read_picture(tmp_path / "big.png")
    with pytest.raises(ValueError, match=r"a\.png is 48x32 = 1,536 pixels, above the limit of 1,000"):
        read_picture(save(tmp_path / "a.png", scene()), max_pixels=1000)


def test_a_small_file_that_unpacks_to_a_huge_picture_is_refused(tmp_path: Path) -> None:
    rows = zlib.compress(bytes(20_001) * 20_000, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert (tmp_path / "bomb.png").stat().st_size < 500_000
    with pytest.raises(ValueError, match=r"bomb\.png is 20000x20000"):
        read_picture(tmp_path / "bomb.png")


def test_a_text_bomb_in_a_png_is_refused(tmp_path: Path) -> None:
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 100_000_000, 9))
    (tmp_path / "t.png").write_bytes(png(32, 32, 8, 0, bytes(33) * 32, text))
    with pytest.raises(ValueError, match=r"t\.png cannot be read as a picture"):
        read_picture(tmp_path / "t.png")


@pytest.mark.parametrize("size", [(1, 1), (15, 400)])
def test_tiny_pictures_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "dot.png")
    with pytest.raises(ValueError, match=rf"dot\.png is {size[0]}x{size[1]} pixels: each side must be at least 16"):
        read_picture(tmp_path / "dot.png")


@pytest.mark.parametrize("ending", ["jpg", "progressive.jpg", "png", "webp", "gif", "tiff", "bmp", "avif", "jp2"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_truncated_files_are_refused(tmp_path: Path, ending: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (128, 128, 3), dtype=np.uint8)
    options = {"progressive": True} if ending.startswith("progressive") else {}
    path = save(tmp_path / f"cut.{ending}", noise, **options)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=rf"cut\.{ending} cannot be read as a picture; it is damaged or truncated"):
        read_picture(path)


def test_reading_randomly_damaged_files_raises_only_value_errors(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    noise = random.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for ending in ("jpg", "png", "gif", "webp", "tiff", "bmp", "avif", "jp2"):
        data = save(tmp_path / f"a.{ending}", noise).read_bytes()
        for _ in range(25):
            broken = bytearray(data)
            for place in random.integers(0, min(len(data), 400), 6):
                broken[place] = random.integers(0, 255)
            (tmp_path / f"a.{ending}").write_bytes(bytes(broken))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read_picture(tmp_path / f"a.{ending}")
                except ValueError as error:
                    assert f"a.{ending}" in str(error)


def test_unsupported_files_are_refused_and_the_error_gives_the_reason(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    with pytest.raises(ValueError, match=r"a\.heic is HEIC, which .* save it as JPEG or PNG"):
        read_picture(tmp_path / "a.heic")
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"a\.png is not a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"gone\.png cannot be read: No such file"):
        read_picture(tmp_path / "gone.png")
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n")
    with pytest.raises(ValueError, match=r"a\.eps is not a picture"):
        read_picture(tmp_path / "a.eps")


# --- masks --------------------------------------------------------------------------------


def test_masks_of_every_kind_are_read(tmp_path: Path) -> None:
    where = np.zeros((32, 48), np.uint8)
    where[5:20, 7:30] = 1
    cases = {"01": where, "0255": where * 255, "16": where.astype(np.uint16) * 65535, "bit": where.astype(bool)}
    for name, array in cases.items():
        mask = np.asarray(read_mask(save(tmp_path / f"{name}.png", array)))
        np.testing.assert_array_equal(mask, where * 255)
    cut = Image.fromarray(scene()).convert("RGBA")
    cut.putalpha(Image.fromarray(where * 255))
    cut.save(tmp_path / "cut.png")
    np.testing.assert_array_equal(np.asarray(read_mask(tmp_path / "cut.png")), where * 255)
    soft = np.arange(32 * 48).reshape(32, 48).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(read_mask(save(tmp_path / "soft.png", soft))), soft)
    save(tmp_path / "none.png", where * 0)
    with pytest.raises(ValueError, match=r"none\.png is empty: it marks no pixel"):
        read_mask(tmp_path / "none.png")
