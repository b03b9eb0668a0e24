"""Unlabeled images from a folder, an archive, shards or Hugging Face: a list of names, and robust decoding to upright
8-bit RGB.

    images = open_images("photos")  # or photos.zip, shards/, https://host/shards, hf:NAME: see open_images
    len(images), images.names[0]
    images.read(0)  # uint8 [H, W, 3]

No label file is needed. Where the folders right below the root are classes, `labels` and `classes` come from them.
"""

import importlib
import io
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from skipless.datasets.storage.names import EXTENSIONS, Names, folder_classes, is_image
from skipless.datasets.storage.tar import (
    INDEX,
    Shards,
    expand_braces,
    read_index,
    read_shard_member,
    reason_of,
    scan_shards,
)
from skipless.datasets.storage.zip import list_archive, read_zip_member

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


@dataclass(frozen=True, eq=False)
class ImageSource:
    """Images of one place, as `open_images` found them. Holds no open file: it can be pickled, forked and used from
    several threads. Names and tables are arrays, so that workers share their memory."""

    root: Path
    """The folder, the archive or the folder of shards. (Of a URL it is what a Path makes of it: print `origin`.)"""
    names: Names
    """Of a folder or an archive, paths below the root with forward slashes, sorted by code point: the same order on
    every machine. Of shards the same, from their index, or SHARD.tar/PATH without one; of Hugging Face data
    SPLIT[ROW]."""
    labels: np.ndarray | None
    """int64 [N], position in `classes`, where every image lies inside a subfolder of the root and there are at least
    two such subfolders; else None. (A root that holds `train` and `val` has these two as its classes: open one.) Of
    shards and Hugging Face data, what they say themselves."""
    classes: tuple[str, ...]
    """Sorted names of the subfolders that hold images; () without labels."""
    members: np.ndarray | None = None
    """int64 [N, k], what `fetch` needs to find each image; None where the images are files of a folder."""
    fetch: Callable[..., bytes] | None = None
    """Called with a row of `members`: the bytes of an image. Raises OSError and ValueError."""
    origin: str = ""
    """What was opened, for messages: the path, a tar's folder, the URL or hf:NAME."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, min_side: int = 0) -> np.ndarray:
        """Decoded image, uint8 [H, W, 3] RGB (see `decode`). Raises UnreadableImage."""
        data = self.read_bytes(index)
        try:
            return decode(data, min_side)
        except ValueError as error:
            raise UnreadableImage(self.place(index), str(error)) from error

    def read_bytes(self, index: int) -> bytes:
        """The image's file as it is stored. Raises UnreadableImage."""
        try:
            if self.members is None or self.fetch is None:
                return (self.root / self.names[index]).read_bytes()
            return self.fetch(*self.members[index].tolist())
        except (OSError, ValueError) as error:
            raise UnreadableImage(self.place(index), reason_of(error)) from error

    def place(self, index: int) -> str:
        """Where an image lies, for messages."""
        return f"{self.origin.rstrip('/')}/{self.names[index]}" if self.origin else str(self.root / self.names[index])


def open_images(path: str | Path) -> ImageSource:
    """Find every image below a folder, inside a zip archive, in tar shards here or behind a URL, or in a data set of
    Hugging Face's `datasets`.

        photos                               a folder
        photos.zip                           an archive, read in place
        shards                               a folder of shards that datasets/shard.py wrote, or of any tars in
                                             WebDataset's format, if it holds no images
        data/{000000..000146}.tar            such tars by a pattern; or one .tar
        https://host/shards, s3://...        shards that datasets/shard.py wrote, wherever fsspec can reach them
        hf:NAME, hf:NAME:SPLIT               a data set on the hub, or a folder that save_to_disk wrote (which needs no
                                             hf:); without SPLIT, train

    In folders and archives, looks at names only (.jpg, .jpeg, .png, .webp, .bmp in any case), at any depth; follows
    symbolic links to files and to folders, except back into a folder they lie in; skips hidden files and folders and
    `__MACOSX`. Files that turn out unreadable are part of the list: `ImageSource.read` raises for them.

    Raises FileNotFoundError for a path that does not exist, ValueError for a file that is no archive, a damaged
    archive, shard or index, zip members that are encrypted or compressed otherwise than by deflate, a missing package,
    and where no image is found.
    """
    text = str(path)
    if not text:
        raise ValueError("the path of the images is empty: give a folder or a .zip archive")
    if text.startswith("hf:") and not text.startswith("hf://"):  # which fsspec reads
        name, _, split = text.removeprefix("hf:").partition(":")
        return _open_hugging_face(name, split, text)
    root = Path(path).expanduser()
    origin = text if "://" in text else str(root)
    members: np.ndarray | None = None
    fetch: Callable[..., bytes] | None = None
    tars = expand_braces(str(root))
    if "://" in text or (root / INDEX).is_file():
        return _from_shards(root, read_index(origin)[0], origin)
    if tars != [str(root)] and not root.exists():
        return _from_shards(root, scan_shards(tars), str(root.parent))
    if root.is_dir():
        if (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file():
            return _open_hugging_face(str(root), "", origin)
        found = sorted(_walk(root))
        tars = [] if found else sorted(str(path) for path in root.glob("*.tar") if path.is_file())
        if tars:
            return _from_shards(root, scan_shards(tars), origin)
    elif root.is_file() and root.suffix.lower() == ".tar":
        return _from_shards(root, scan_shards([str(root)]), str(root.parent))
    elif root.is_file():
        found, members = list_archive(root)
        fetch = partial(read_zip_member, root)
    else:
        raise FileNotFoundError(f"{root}: no such folder or zip archive of images")
    if not found:
        raise ValueError(f"{root}: no image found (looked for {', '.join(EXTENSIONS)}, in subfolders too)")
    return ImageSource(root, Names(found), *folder_classes(found), members, fetch, origin)


def _from_shards(root: Path, shards: Shards, origin: str) -> ImageSource:
    if not len(shards.names):
        raise ValueError(f"{root}: no image found in these tars (looked for KEY{', KEY'.join(EXTENSIONS)})")
    fetch = partial(read_shard_member, shards.files)
    return ImageSource(root, shards.names, shards.labels, shards.classes, shards.table, fetch, origin)


def _open_hugging_face(name: str, split: str, origin: str) -> ImageSource:
    """The first column of the feature Image, with the first of ClassLabel, if there is one."""
    try:
        datasets: Any = importlib.import_module("datasets")
        load_dataset, load_from_disk = datasets.load_dataset, datasets.load_from_disk
    except (ImportError, AttributeError):  # without it, a folder of this name can take its place
        raise ValueError(f"{origin}: Hugging Face data need the package datasets: pip install datasets") from None
    folder = Path(name).expanduser()
    try:
        found: Any = load_from_disk(str(folder)) if folder.is_dir() else load_dataset(name, split=split or "train")
    except Exception as error:  # unknown name, no network, other files: each has a class of its own
        raise ValueError(f"{origin}: datasets cannot load this ({reason_of(error)})") from None
    if isinstance(found, dict):  # splits
        split = split or "train"
        if split not in found:
            raise ValueError(f"{origin} has no split {split}; choose one of {', '.join(found)} as hf:{name}:SPLIT")
        found = found[split]
    elif folder.is_dir() and split:
        raise ValueError(f"{origin}: {name} holds one Dataset, and no splits; open it as hf:{name}")
    kinds = found.features
    image = next((column for column, kind in kinds.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        raise ValueError(f"{origin} has no column of the feature Image, only {', '.join(kinds)}")
    if not len(found):
        raise ValueError(f"{origin}: no image found, since it has no rows")
    labels, classes = None, ()
    label = next((column for column, kind in kinds.items() if isinstance(kind, datasets.ClassLabel)), None)
    if label is not None:
        numbers = np.asarray(found[label][:], np.float64)  # a missing label becomes NaN
        if (numbers >= 0).all():  # the hub gives -1 to those that are kept secret
            labels, classes = numbers.astype(np.int64), tuple(kinds[label].names)
    # Undecoded: our reader knows what to do with orientation, transparency and damage.
    rows = found.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    names = Names([f"{split or found.split or 'train'}[{row}]" for row in range(len(rows))])
    members = np.arange(len(rows))[:, None]
    return ImageSource(Path(name), names, labels, classes, members, partial(_read_row, rows, image), origin)


def _read_row(rows: Any, column: str, row: int) -> bytes:
    stored = rows[row][column] or {"bytes": None, "path": None}
    if stored["bytes"] is not None:
        return stored["bytes"]
    if stored["path"] is None:
        raise ValueError("there is no image in this row")
    return Path(stored["path"]).read_bytes()


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
    out dark and are better stretched where they are written. Color profiles are ignored; of animations, the first
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
    # writers follow by padding. What is missing would come out gray (some versions of OpenCV say nothing about it).
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
    if image.mode.startswith("I"):  # 16-bit gray, whose conversion Pillow clips at 255
        high = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return cv2.cvtColor(high.astype(np.uint8), cv2.COLOR_GRAY2RGB)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(image.convert("RGB"))


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
            elif is_image(entry.name) and (entry.is_symlink() or entry.is_file()):
                names.append(name)
    return names
