"""Which pixels come out of image files of every format, whole, turned and damaged."""

import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipless.datasets.images import UnreadableImage, open_images, read_image
from skipless.datasets.storage import decode as decode_module
from skipless.datasets.storage.decode import decode

HEIGHT, WIDTH = 48, 64


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth, so that lossy formats keep it, and without any symmetry: red grows to the right, green downwards."""
    down, right = np.mgrid[0:height, 0:width]
    return np.dstack([right * 255 // width, down * 255 // height, 255 - right * 120 // width]).astype(np.uint8)


def encode(image: Image.Image | np.ndarray, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R BT.601, repeated in three channels."""
    return np.repeat((rgb @ np.array([0.299, 0.587, 0.114]))[..., None], 3, axis=2)


def assert_near(image: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    assert image.dtype == np.uint8
    assert image.shape == expected.shape
    assert np.abs(image.astype(float) - expected).max() <= tolerance


RGB = picture()
GRAY16 = (np.arange(HEIGHT * WIDTH, dtype=np.uint32).reshape(HEIGHT, WIDTH) * 65535 // (HEIGHT * WIDTH - 1)).astype(
    np.uint16
)
ALPHA = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
ALPHA[:, WIDTH // 2 :] = 0
ALPHA[:8] = 128
OVER_WHITE = RGB * (ALPHA / 255) + 255 * (1 - ALPHA / 255)
PALETTE = Image.fromarray(RGB).quantize(32)
INDICES = np.asarray(PALETTE)
CLEAR_ENTRY = int(INDICES[0, 0])
PALETTE_RGB = np.asarray(PALETTE.convert("RGB"))

FORMATS = {
    "JPEG": (encode(RGB, "JPEG", quality=95), RGB, 8),
    "JPEG progressive": (encode(RGB, "JPEG", quality=95, progressive=True), RGB, 8),
    "JPEG gray": (encode(Image.fromarray(RGB).convert("L"), "JPEG", quality=95), luma(RGB), 4),
    "JPEG CMYK": (encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", quality=95), RGB, 8),
    "JPEG stored as RGB": (encode(RGB, "JPEG", quality=95, keep_rgb=True), RGB, 8),
    "PNG": (encode(RGB, "PNG"), RGB, 0),
    "PNG gray": (encode(Image.fromarray(RGB).convert("L"), "PNG"), luma(RGB), 1),
    "PNG 1 bit": (encode(Image.fromarray(RGB[..., 0] > 99), "PNG"), np.dstack([(RGB[..., 0] > 99) * 255] * 3), 0),
    "PNG gray 16 bit": (encode(GRAY16, "PNG"), np.dstack([GRAY16 / 257] * 3), 1),
    "PNG RGB 16 bit": (cv2.imencode(".png", np.dstack([GRAY16] * 3))[1].tobytes(), np.dstack([GRAY16 / 257] * 3), 1),
    "PNG RGBA": (encode(np.dstack([RGB, ALPHA]), "PNG"), OVER_WHITE, 1),
    "PNG gray and alpha": (
        encode(Image.fromarray(np.dstack([RGB, ALPHA])).convert("LA"), "PNG"),
        luma(RGB) * (ALPHA / 255) + 255 * (1 - ALPHA / 255),
        1.5,
    ),
    "PNG palette": (encode(PALETTE, "PNG"), PALETTE_RGB, 0),
    "PNG palette with a transparent entry": (
        encode(PALETTE, "PNG", transparency=CLEAR_ENTRY),
        np.where((INDICES == CLEAR_ENTRY)[..., None], 255, PALETTE_RGB),
        0,
    ),
    "WebP": (encode(RGB, "WEBP", quality=95), RGB, 16),
    "WebP lossless": (encode(RGB, "WEBP", lossless=True), RGB, 0),
    "WebP with alpha": (encode(np.dstack([RGB, ALPHA]), "WEBP", lossless=True, exact=True), OVER_WHITE, 1),
    "BMP": (encode(RGB, "BMP"), RGB, 0),
    "GIF": (encode(PALETTE, "GIF"), PALETTE_RGB, 0),
    "TIFF": (encode(RGB, "TIFF"), RGB, 0),
    "TIFF compressed": (encode(RGB, "TIFF", compression="tiff_lzw"), RGB, 0),
    "TIFF CMYK": (encode(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB, 1),
    "TIFF gray 16 bit": (encode(GRAY16, "TIFF"), np.dstack([GRAY16 / 257] * 3), 1),
    "TIFF RGBA": (encode(np.dstack([RGB, ALPHA]), "TIFF"), OVER_WHITE, 1),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_rgb(name: str) -> None:
    data, expected, tolerance = FORMATS[name]
    assert_near(decode(data), expected, tolerance)


def test_the_content_decides_not_the_extension(tmp_path: Path) -> None:
    for name, extension in (("PNG", ".jpg"), ("JPEG", ".png"), ("GIF", ".jpeg"), ("WebP", ".bmp")):
        (tmp_path / f"{name}{extension}").write_bytes(FORMATS[name][0])
        assert_near(read_image(tmp_path / f"{name}{extension}"), *FORMATS[name][1:])


# Where row 0 and column 0 of the stored picture are to be seen (Exif 2.3, tag 274).
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    row, column = ORIENTATIONS[orientation]
    image = upright if row in ("top", "bottom") else upright.transpose(1, 0, 2)
    image = image[::-1] if row in ("bottom", "right") else image
    return np.ascontiguousarray(image[:, ::-1] if column in ("bottom", "right") else image)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("form", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")])
def test_exif_orientation_is_undone(form: str, mode: str, orientation: int) -> None:
    image = Image.fromarray(stored(RGB, orientation)).convert(mode)
    assert_near(decode(encode(image, form, quality=95, exif=exif(orientation))), RGB, 16)


def test_exif_orientation_is_found_behind_xmp() -> None:
    data = encode(stored(RGB, 6), "JPEG", quality=95, exif=exif(6))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    segment = b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp
    assert_near(decode(data[:2] + segment + data[2:]), RGB, 8)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_and_unknown_orientations_are_ignored() -> None:
    plain = encode(RGB, "JPEG", quality=95)
    for body in (b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff", b"Exif\0\0garbage"):
        segment = b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
        assert_near(decode(plain[:2] + segment + plain[2:]), RGB, 8)
    assert_near(decode(encode(RGB, "JPEG", quality=95, exif=exif(9))), RGB, 8)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("min_side", "factor"), [(0, 1), (1, 8), (24, 8), (25, 4), (48, 4), (49, 2), (96, 2), (97, 1), (192, 1), (500, 1)]
)
def test_jpegs_are_decoded_no_smaller_than_needed(min_side: int, factor: int, orientation: int) -> None:
    upright = picture(192, 256)
    image = decode(encode(stored(upright, orientation), "JPEG", quality=95, exif=exif(orientation)), min_side)
    assert_near(image, cv2.resize(upright, (256 // factor, 192 // factor), interpolation=cv2.INTER_AREA), 8)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300))
@settings(max_examples=40)
def test_reduced_decoding_keeps_the_short_side(height: int, width: int, min_side: int) -> None:
    image = decode(encode(picture(height, width), "JPEG"), min_side)
    assert min(image.shape[:2]) >= min(min_side, height, width)
    assert image.shape[0] <= height


def test_other_formats_ignore_min_side() -> None:
    assert decode(FORMATS["PNG"][0], min_side=1).shape == RGB.shape
    assert decode(FORMATS["JPEG CMYK"][0], min_side=1).shape == RGB.shape


@pytest.mark.parametrize("name", ["JPEG", "JPEG progressive", "JPEG gray", "JPEG CMYK", "PNG", "WebP", "WebP lossless"])
def test_no_half_pictures_from_truncated_files(name: str) -> None:
    data, expected, tolerance = FORMATS[name]
    complete = 0
    for size in range(len(data)):
        try:
            image = decode(data[:size])
        except ValueError:
            continue
        complete += 1
        assert_near(image, expected, tolerance)
    assert complete <= (20 if name == "PNG" else 0)  # a PNG may lack its last checksums and end mark


def test_a_jpeg_without_its_last_bytes_is_truncated() -> None:
    for name in ("JPEG", "JPEG progressive"):
        for missing in (1, 2, 20):
            with pytest.raises(ValueError, match="truncated JPEG"):
                decode(FORMATS[name][0][:-missing])


def test_the_end_of_an_embedded_preview_does_not_hide_a_truncation() -> None:
    preview = b"Exif\0\0" + encode(picture(8, 8), "JPEG")
    data = FORMATS["JPEG"][0]
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview + data[2:]
    assert_near(decode(data), RGB, 8)
    with pytest.raises(ValueError, match="truncated JPEG"):
        decode(data[:-40])


def test_padding_after_the_end_of_a_jpeg_is_harmless() -> None:
    for tail in (b"\0" * 4096, b"\n", os.urandom(100), FORMATS["JPEG"][0]):
        assert_near(decode(FORMATS["JPEG"][0] + tail), RGB, 8)


def stated_size(form: str, width: int, height: int) -> bytes:
    """A picture of a few pixels that says it has more: in PNG's first chunk, in JPEG's start of frame."""
    data = bytearray(encode(RGB, form))
    if form == "PNG":
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    else:
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.filterwarnings("error")
def test_images_of_many_megapixels_are_read() -> None:
    """Pillow's own limit is 179 megapixels, and its warning begins at half of that."""
    large = np.zeros((9_600, 9_600), np.uint8)
    large[-1, -1] = 200
    with pytest.warns(UserWarning, match="more than 90 megapixels"):
        read = decode(cv2.imencode(".png", large)[1].tobytes())
    assert (read.shape, read[-1, -1].tolist(), read[0, 0].tolist()) == ((9600, 9600, 3), [200] * 3, [0] * 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>404 Not Found</html>", "the content is not that of a JPEG, PNG, WebP, BMP, GIF or TIFF image"),
        (b"\xff\xd8\xff\xd9", "image"),
        (b"\x89PNG\r\n\x1a\n", "image"),
        (encode(Image.new("F", (4, 4), 0.5), "TIFF"), "its values are floating-point numbers"),
        (stated_size("PNG", 400_000, 400_000), "its 400,000 x 400,000 pixels take 1,920 GB of memory to read"),
        (stated_size("JPEG", 65_000, 65_000), "its 65,000 x 65,000 pixels take 51 GB of memory to read"),
    ],
)
def test_what_is_no_image_says_so(tmp_path: Path, data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "host_memory", lambda: 16e9)
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(UnreadableImage) as caught:
        open_images(tmp_path).read(0)
    assert caught.value.path == str(tmp_path / "a.jpg")
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)


@given(
    st.sampled_from(sorted(FORMATS)), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8)
)
@settings(max_examples=150)
def test_damage_gives_an_image_or_a_value_error(name: str, changes: list[tuple[float, int]]) -> None:
    data = bytearray(FORMATS[name][0])
    for place, value in changes:
        data[int(place * (len(data) - 1))] = value
    try:
        image = decode(bytes(data), min_side=10)
    except ValueError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3
    assert image.shape[2] == 3
