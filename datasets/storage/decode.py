"""Bytes of image files become pixels: upright 8-bit RGB, whatever the format, or one clear error."""

import io
import struct
import warnings
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps

from skipless.common.memory import host_memory

# What Pillow may try: the formats that are listed, and the ones that are commonly found under a wrong extension.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
Image.MAX_IMAGE_PIXELS = None  # `require_memory` is the limit
LARGE = 90_000_000  # pixels from which on an image is slow to read
# OpenCV decodes JPEGs at a part of their size, several times faster.
REDUCED = ((8, cv2.IMREAD_REDUCED_COLOR_8), (4, cv2.IMREAD_REDUCED_COLOR_4), (2, cv2.IMREAD_REDUCED_COLOR_2))


def decode(data: bytes, min_side: int = 0) -> np.ndarray:
    """Decode the bytes of a JPEG, PNG, WebP, BMP, GIF or TIFF file, whatever its extension was, to uint8 [H, W, 3] RGB.

    Turned upright by its EXIF orientation. Transparent images are laid over white, as a page would show them. Values of
    16 bits keep their upper 8: the full range 0..65535 is assumed, so data that use less of it (12-bit sensors) come
    out dark and are better stretched where they are written. Color profiles are ignored; of animations and of several
    pages, the first.

    With `min_side` > 0 a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its short side stays at least `min_side`,
    which is several times faster for photographs of many megapixels.

    Raises ValueError, saying why, for data that are truncated, damaged or no image, for floating-point values, and for
    more pixels than this machine has memory for. Damage inside a JPEG's compressed
    data that leaves its structure whole cannot be told from a picture and is returned as decoded.

    JPEGs of one and three components go through OpenCV (about 1.4 times as fast as Pillow, same values). The rest goes
    through Pillow: it is right about palettes, transparency, CMYK and 16 bits, where OpenCV is not in all versions.
    """
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"\xff\xd8"):
        image = _decode_jpeg(data, min_side)
        if image is not None:
            return image
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as opened:
            require_memory(*opened.size)
            opened.load()
            return _upright_rgb(opened)
    except Image.UnidentifiedImageError:
        raise ValueError("the content is not that of a JPEG, PNG, WebP, BMP, GIF or TIFF image") from None
    except NotSupported:
        raise
    except Exception as error:  # Pillow raises what its parsers raise: struct.error, SyntaxError, zlib.error, ...
        raise ValueError(f"damaged or truncated image ({error or type(error).__name__})") from error


class NotSupported(ValueError):
    """An image that may be whole, but cannot be read here."""


def require_memory(width: int, height: int) -> None:
    """Raises NotSupported for an image whose pixels would take more than half of this machine's memory: a few bytes can
    state any size. Warns once of large ones."""
    needed = 12 * width * height  # as decoded and as RGB, of four and three bytes, and on the way from one to the other
    if 2 * needed > host_memory():
        raise NotSupported(
            f"its {width:,} x {height:,} pixels take {needed / 1e9:,.0f} GB of memory to read: shrink it"
        )
    if width * height > LARGE:
        warnings.warn("there are images of more than 90 megapixels, which take long to read: shrink them", stacklevel=2)


class JpegHeader(NamedTuple):
    """What the segments before a JPEG's first scan say."""

    height: int
    width: int
    components: int
    orientation: int
    """EXIF's, or 0 where there is none."""
    end: int
    """Position of the first scan's data."""


def _decode_jpeg(data: bytes, min_side: int) -> np.ndarray | None:
    """The image, or None where Pillow should look at it. Raises ValueError for a truncated one."""
    header = _jpeg_header(data)
    if header is None:
        return None
    # 0xFF in compressed data is always followed by 0 or a restart marker, so this is the end of image, which some
    # writers follow by padding. What is missing would come out gray (some versions of OpenCV say nothing about it).
    if data.rfind(b"\xff\xd9", header.end) < 0:
        raise ValueError("truncated JPEG (no end-of-image marker)")
    if header.components not in (1, 3):
        return None
    short = min(header.height, header.width)
    factor, flags = next(((f, flag) for f, flag in REDUCED if 0 < min_side <= short // f), (1, cv2.IMREAD_COLOR))
    require_memory(header.width // factor, header.height // factor)
    try:
        # OpenCV's own reading of the orientation misses it in some versions when XMP metadata come first.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if image is None:
        return None
    return _turn(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), header.orientation)


def _jpeg_header(data: bytes) -> JpegHeader | None:
    """The segments up to the first scan (ITU-T T.81, annex B); None where they are not as they should be."""
    height = width = components = orientation = 0
    position = 2
    while len(data) >= position + 4 and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        body, position = position + 4, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if position > len(data):
            return None
        if marker == 0xDA:
            return JpegHeader(height, width, components, orientation, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position - body >= 6:  # start of frame
            height, width, components = struct.unpack(">xHHB", data[body : body + 6])
        elif marker == 0xE1 and not orientation and data.startswith(b"Exif\0\0", body):
            orientation = _orientation(data[body:position])
    return None


def _orientation(exif: bytes) -> int:
    tags = Image.Exif()
    try:
        tags.load(exif)
        return int(tags.get(0x0112, 1))
    except Exception:  # damaged metadata do not make the picture unreadable
        return 1


def _turn(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (1..8; other values are ignored, as viewers do)."""
    if orientation in (5, 6, 7, 8):
        image = cv2.transpose(image)
    if orientation in (2, 3, 6, 7):
        image = cv2.flip(image, 1)
    if orientation in (3, 4, 7, 8):
        image = cv2.flip(image, 0)
    return image


def _upright_rgb(image: Image.Image) -> np.ndarray:
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise NotSupported("its values are floating-point numbers: write it again with 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit gray, whose conversion Pillow clips at 255
        high = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return cv2.cvtColor(high.astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))
