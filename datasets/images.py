"""Unlabelled images from any folder or zip archive: a sorted list of names, and robust decoding to upright 8-bit RGB.

    images = open_images("photos")  # or "photos.zip", read in place
    len(images), images.names[0]
    images.read(0)  # uint8 [H, W, 3]

No label file is needed. Where the folders right below the root are classes, `labels` and `classes` come from them.
"""

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import cv2
import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# What Pillow may try: the formats above, and the ones that are commonly found under a wrong extension.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


class UnreadableImage(ValueError):
    """An image that cannot be read: `path` says where it lies (printable), `reason` what is wrong with it."""

    def __init__(self, path: str | Path, reason: str) -> None:
        # Linux allows file names that are not UTF-8; written to a log as they are they would raise there.
        self.path = str(path).encode(errors="backslashreplace").decode()
        self.reason = reason
        super().__init__(self.path, reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class Names(Sequence[str]):
    """Read-only sequence of strings in two buffers: a list of millions of `str` would cost ten times the memory, and be
    copied into every forked worker as its reference counts change."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        positions = range(len(self))[index]  # raises IndexError as a list would
        if isinstance(positions, range):
            return [self[position] for position in positions]
        return os.fsdecode(self._bytes[self._ends[positions] : self._ends[positions + 1]])


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images of one folder or zip archive, as `open_images` found them. Holds no open file: it can be pickled, forked
    and used from several threads."""

    root: Path
    """The folder or the archive."""
    names: Names
    """Paths below the root with forward slashes, sorted by code point: the same order on every machine."""
    labels: np.ndarray | None
    """int64 [N], position in `classes`, where every image lies inside a subfolder of the root and there are at least
    two such subfolders; else None. (A root that holds `train` and `val` has these two as its classes: open one.)"""
    classes: tuple[str, ...]
    """Sorted names of the subfolders that hold images; () without labels."""
    members: np.ndarray | None = None
    """For an archive, int64 [N, 5]: offset of the local header, compressed size, size, method, CRC-32."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, min_side: int = 0) -> np.ndarray:
        """Decoded image, uint8 [H, W, 3] RGB (see `decode`). Raises UnreadableImage."""
        path = self.root / self.names[index]
        if self.members is None:
            return read_image(path, min_side)
        try:
            return decode(_read_member(self.root, *self.members[index].tolist()), min_side)
        except (OSError, ValueError) as error:
            raise UnreadableImage(path, getattr(error, "strerror", None) or str(error)) from error


def open_images(path: str | Path) -> ImageSource:
    """Find every image below a folder, or inside a zip archive.

    Looks at names only (.jpg, .jpeg, .png, .webp, .bmp in any case), at any depth; follows symbolic links to files and
    to folders, except back into a folder they lie in; skips hidden files and folders and `__MACOSX`. Files that turn
    out unreadable are part of the list: `ImageSource.read` raises for them.

    Raises FileNotFoundError for a path that does not exist, ValueError for a file that is no zip archive, a damaged
    archive, one whose members are encrypted or compressed otherwise than by deflate, and where no image is found.
    """
    if not str(path):
        raise ValueError("the path of the images is empty: give a folder or a .zip archive")
    root = Path(path).expanduser()
    if root.is_dir():
        names, members = sorted(_walk(root)), None
    elif root.is_file():
        names, members = _list_archive(root)
    else:
        raise FileNotFoundError(f"{root}: no such folder or zip archive of images")
    if not names:
        raise ValueError(f"{root}: no image found (looked for {', '.join(EXTENSIONS)}, in subfolders too)")
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(folders)))
    if len(classes) < 2 or "" in classes:
        return ImageSource(root, Names(names), None, (), members)
    number = {name: position for position, name in enumerate(classes)}
    return ImageSource(root, Names(names), np.array([number[name] for name in folders], np.int64), classes, members)


def read_image(path: str | Path, min_side: int = 0) -> np.ndarray:
    """One image file as uint8 [H, W, 3] RGB (see `decode`). Raises UnreadableImage, for a missing file too."""
    try:
        return decode(Path(path).read_bytes(), min_side)
    except (OSError, ValueError) as error:
        raise UnreadableImage(path, getattr(error, "strerror", None) or str(error)) from error


def decode(data: bytes, min_side: int = 0) -> np.ndarray:
    """Decode the bytes of a JPEG, PNG, WebP, BMP or GIF file, whatever its extension was, to uint8 [H, W, 3] RGB.

    Turned upright by its EXIF orientation. Transparent images are laid over white, as a page would show them. Values of
    16 bits keep their upper 8: the full range 0..65535 is assumed, so data that use less of it (12-bit sensors) come
    out dark and are better stretched where they are written. Colour profiles are ignored; of animations, the first
    frame.

    With `min_side` > 0 a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if its short side stays at least `min_side`,
    which is several times faster for photographs of many megapixels.

    Raises ValueError, saying why, for data that are truncated, damaged or no image. Damage inside a JPEG's compressed
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
            opened.load()
            return _upright_rgb(opened)
    except Image.UnidentifiedImageError:
        raise ValueError("the content is not that of a JPEG, PNG, WebP, BMP or GIF image") from None
    except Exception as error:  # Pillow raises what its parsers raise: struct.error, SyntaxError, zlib.error, ...
        raise ValueError(f"damaged or truncated image ({error or type(error).__name__})") from error


def _decode_jpeg(data: bytes, min_side: int) -> np.ndarray | None:
    """The image, or None where Pillow should look at it. Raises ValueError for a truncated one."""
    height = width = components = orientation = 0
    position = 2
    while True:  # the segments of the header, up to the first scan (ITU-T T.81, annex B)
        if len(data) < position + 4 or data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        body, position = position + 4, position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if position > len(data):
            return None
        if marker == 0xDA:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and position - body >= 6:  # start of frame
            height, width, components = struct.unpack(">xHHB", data[body : body + 6])
        elif marker == 0xE1 and not orientation and data.startswith(b"Exif\0\0", body):
            orientation = _orientation(data[body:position])
    # 0xFF in compressed data is always followed by 0 or a restart marker, so this is the end of image, which some
    # writers follow by padding. What is missing would come out grey (some versions of OpenCV say nothing about it).
    if data.rfind(b"\xff\xd9", position) < 0:
        raise ValueError("truncated JPEG (no end-of-image marker)")
    if components not in (1, 3):
        return None
    flags = cv2.IMREAD_COLOR
    for factor, reduced in (
        (8, cv2.IMREAD_REDUCED_COLOR_8),
        (4, cv2.IMREAD_REDUCED_COLOR_4),
        (2, cv2.IMREAD_REDUCED_COLOR_2),
    ):
        if 0 < min_side <= min(height, width) // factor:
            flags = reduced
            break
    try:
        # OpenCV's own reading of the orientation misses it in some versions when XMP metadata come first.
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error:
        return None
    if image is None:
        return None
    return _turn(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), orientation)


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
    if image.mode.startswith("I"):  # 16-bit grey, whose conversion Pillow clips at 255
        high = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return cv2.cvtColor(high.astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))


def _is_image(name: str) -> bool:
    """Whether a path below the root counts: an image by its extension, nothing hidden on the way."""
    return name.lower().endswith(EXTENSIONS) and not any(
        part.startswith(".") or part == "__MACOSX" for part in name.split("/")
    )


def _walk(root: Path) -> list[str]:
    """Images below a folder, unsorted. A link back to a folder that contains it is a loop, and not followed."""
    names: list[str] = []
    status = os.stat(root)
    todo = [("", frozenset([(status.st_dev, status.st_ino)]))]
    while todo:
        prefix, ancestors = todo.pop()
        try:
            entries = list(os.scandir(root / prefix))
        except OSError as error:
            raise ValueError(f"{root / prefix}: cannot list this folder ({error.strerror})") from error
        for entry in entries:
            name = prefix + entry.name
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            try:
                is_folder = entry.is_dir()
            except OSError:  # a link to itself
                is_folder = False
            if is_folder:
                status = os.stat(entry.path)  # entry.stat() has no inode on Windows
                identity = (status.st_dev, status.st_ino)
                if identity not in ancestors:
                    todo.append((name + "/", ancestors | {identity}))
            # A broken link is listed: better reported as unreadable than left out in silence.
            elif _is_image(entry.name) and (entry.is_symlink() or entry.is_file()):
                names.append(name)
    return names


def _list_archive(path: Path) -> tuple[list[str], np.ndarray]:
    """Sorted names of the images in a zip archive and their table, as ImageSource keeps it."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = {_normal(info.filename): info for info in archive.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError, struct.error) as error:
        if path.suffix.lower() == ".zip":
            raise ValueError(f"{path}: damaged zip archive ({error})") from error
        raise ValueError(f"{path}: is a file, but not a zip archive; give a folder or a .zip of images") from error
    names = sorted(filter(_is_image, found))
    table = []
    for name in names:
        info = found[name]
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {name} is encrypted or compressed by a method other than deflate; "
                "write the archive again, stored or with deflate"
            )
        table.append((info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC))
    return names, np.array(table, np.int64).reshape(-1, 5)


def _normal(name: str) -> str:
    """Path of a member as other writers would have written it: `.\\a\\b.png` and `/a//b.png` become `a/b.png`."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def _read_member(archive: Path, offset: int, compressed_size: int, size: int, method: int, crc: int) -> bytes:
    """Bytes of one member. The archive is opened anew each time (microseconds): nothing to share between processes.

    Python's zipfile would parse the whole directory again in every worker: seconds, and half a kilobyte a member.
    """
    with open(archive, "rb") as file:
        file.seek(offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise ValueError("damaged zip archive (no header where its directory points)")
        file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
        data = file.read(compressed_size)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS)
        except zlib.error as error:
            raise ValueError(f"damaged zip archive ({error})") from error
    if len(data) != size or zlib.crc32(data) != crc:
        raise ValueError("damaged zip archive (its checksum does not match)")
    return data
