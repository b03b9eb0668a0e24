"""Unlabeled images from a folder, an archive, shards or Hugging Face: a list of names, and robust decoding to upright
8-bit RGB.

    images = open_images("photos")  # or photos.zip, shards/, https://host/shards, hf:NAME: see open_images
    len(images), images.names[0]
    images.read(0)  # uint8 [H, W, 3]

No label file is needed. Where the folders right below the root are classes, `labels` and `classes` come from them.
"""

import errno
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from skipless.common.files import printable
from skipless.datasets.storage.decode import decode
from skipless.datasets.storage.folder import read_file, walk_images
from skipless.datasets.storage.huggingface import Table, open_table
from skipless.datasets.storage.names import EXTENSIONS, Names, folder_classes, remarks, without_masks
from skipless.datasets.storage.remote import reason_of
from skipless.datasets.storage.shards import INDEX, Shards, read_index, read_shard_member
from skipless.datasets.storage.tar import expand_braces, scan_shards
from skipless.datasets.storage.zip import list_archive, read_zip_member

DISK_ERRORS = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.ENODEV)
PAUSES = (0.5, 1, 2, 4, 8, 15)  # seconds before another try


class UnreadableImage(ValueError):
    """An image that cannot be read: `path` says where it lies (printable), `reason` what is wrong with it."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path = printable(path)
        self.reason = reason
        super().__init__(self.path, reason)

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class GoneError(OSError):
    """The place where the images lie is not there any more."""


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
    remarks: tuple[str, ...] = ()
    """Sentences where the images may be others, or fewer, than were meant."""

    def __len__(self) -> int:
        return len(self.names)

    @property
    def names_sha256(self) -> str:
        """A digest of all names, in their order."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.names[index].encode(errors="surrogateescape") + b"\0")
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """What a run remembers of its images: how many `images`, and digests of all `names` and of the `content` of a
        few, evenly spread."""
        content = hashlib.sha256()
        for index in np.linspace(0, len(self) - 1, min(len(self), 16)).astype(int).tolist():
            with suppress(UnreadableImage):
                content.update(self.read_bytes(index))
        return {"images": len(self), "names": self.names_sha256, "content": content.hexdigest()}

    def read(self, index: int, min_side: int = 0) -> np.ndarray:
        """Decoded image, uint8 [H, W, 3] RGB (see `decode`). Raises UnreadableImage."""
        data = self.read_bytes(index)
        try:
            return decode(data, min_side)
        except ValueError as error:
            raise UnreadableImage(self.place(index), str(error)) from error

    def read_bytes(self, index: int) -> bytes:
        """The image's file as it is stored. Waits for a disk that is away to come back, half a minute at most.

        Raises:
            UnreadableImage: it cannot be read; GoneError: none can.
        """
        for pause in (*PAUSES, 0):
            try:
                if self.members is None or self.fetch is None:
                    return read_file(self.root / self.names[index])
                return self.fetch(*self.members[index].tolist())
            except (OSError, ValueError) as error:
                failure, there = error, self._there()
                if there and getattr(error, "errno", None) not in DISK_ERRORS:
                    break
            time.sleep(pause)
        if there:
            raise UnreadableImage(self.place(index), reason_of(failure)) from failure
        raise GoneError(
            f"the images in {self.origin or self.root} have been gone for {sum(PAUSES):.0f} seconds: look "
            "whether its disk is there"
        ) from failure

    def _there(self) -> bool:
        """Whether the folder or the archive is; a disk that is not mounted leaves an empty folder."""
        if "://" in self.origin or isinstance(getattr(self.fetch, "__self__", None), Table):  # they wait themselves
            return True
        place = self.origin or self.root
        try:
            with os.scandir(place) as entries:
                return any(entries)
        except OSError:
            return os.path.isfile(place)

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

    In folders and archives, looks at names only (.jpg, .jpeg, .png, .webp, .bmp, .tif, .tiff, .gif in any case), at any
    depth; follows symbolic links to files and to folders, except back into a folder they lie in; skips hidden files and
    folders, `__MACOSX`, and label masks where they lie beside images as data sets have them (see `names.MASKS`). Files
    that turn out unreadable are part of the list: `ImageSource.read` raises for them.

    Raises FileNotFoundError for a path that does not exist, ValueError for a file that is no archive, a damaged
    archive, shard or index, zip members that are encrypted or compressed otherwise than by deflate, a missing package,
    and where no image is found.
    """
    text = str(path)
    if not text:
        raise ValueError("the path of the images is empty: give a folder or a .zip archive")
    if text.startswith("hf:") and not text.startswith("hf://"):  # which fsspec reads
        name, _, split = text.removeprefix("hf:").partition(":")
        return from_table(name, open_table(name, split, origin=text), text)
    root = Path(path).expanduser()
    origin = text if "://" in text else str(root)
    if "://" in text or (root / INDEX).is_file():
        return _from_shards(root, read_index(origin)[0], origin)
    if root.is_dir():
        return _from_folder(root, origin)
    tars = expand_braces(str(root))
    if not root.exists() and tars != [str(root)]:
        return _from_shards(root, scan_shards(tars), str(root.parent))
    if not root.is_file():
        raise FileNotFoundError(f"{root}: no such folder or zip archive of images")
    if root.suffix.lower() == ".tar":
        return _from_shards(root, scan_shards([str(root)]), str(root.parent))
    names, members, others = list_archive(root)
    return _from_names(root, names, origin, others, members, partial(read_zip_member, root))


def _from_folder(root: Path, origin: str) -> ImageSource:
    if (root / "dataset_dict.json").is_file() or (root / "dataset_info.json").is_file():
        return from_table(str(root), open_table(str(root)), origin)
    names, others = walk_images(root)
    tars = [] if names else sorted(str(path) for path in root.glob("*.tar") if path.is_file())
    return _from_shards(root, scan_shards(tars), origin) if tars else _from_names(root, sorted(names), origin, others)


def _from_names(
    root: Path,
    names: list[str],
    origin: str,
    others: Counter[str],
    members: np.ndarray | None = None,
    fetch: Callable[..., bytes] | None = None,
) -> ImageSource:
    if not names:
        kinds = f"; {sum(others.values()):,} files of kinds that are not read: {', '.join(others)}" if others else ""
        raise ValueError(f"{root}: no image found (looked for {', '.join(EXTENSIONS)}, in subfolders too{kinds})")
    rows, folders = without_masks(names)
    said = remarks(names, len(names) - len(rows), folders, others)
    if len(rows) < len(names):
        names, members = [names[row] for row in rows], None if members is None else members[rows]
    return ImageSource(root, Names(names), *folder_classes(names), members, fetch, origin, tuple(said))


def _from_shards(root: Path, shards: Shards, origin: str) -> ImageSource:
    if not len(shards.names):
        raise ValueError(f"{root}: no image found in these tars (looked for KEY{', KEY'.join(EXTENSIONS)})")
    fetch = partial(read_shard_member, shards.files)
    return ImageSource(root, shards.names, shards.labels, shards.classes, shards.table, fetch, origin, shards.remarks)


def from_table(name: str, table: Table, origin: str) -> ImageSource:
    """The images of a split of Hugging Face data."""
    names = Names([f"{table.split}[{row}]" for row in range(len(table.images))])
    members = np.arange(len(names))[:, None]
    return ImageSource(Path(name), names, table.labels, table.classes, members, table.read_bytes, origin)


def read_image(path: str | Path, min_side: int = 0) -> np.ndarray:
    """One image file as uint8 [H, W, 3] RGB (see `decode`). Raises UnreadableImage, for a missing file too."""
    try:
        return decode(read_file(path), min_side)
    except (OSError, ValueError) as error:
        raise UnreadableImage(path, getattr(error, "strerror", None) or str(error)) from error
