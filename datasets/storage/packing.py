"""Images packed into tar shards in WebDataset's format, with the index that finds each of them again."""

import hashlib
import io
import os
import sys
import tarfile
import zlib
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from skipless.common.files import holds_already, whole_folder
from skipless.common.processes import available_cores, spread
from skipless.common.progress import Progress
from skipless.datasets.images import ImageSource, UnreadableImage
from skipless.datasets.storage.decode import decode
from skipless.datasets.storage.names import Names
from skipless.datasets.storage.shards import INDEX, Shards, read_index, write_index
from skipless.datasets.storage.tar import BLOCK, split_key

QUALITY = 90
UNREADABLE = "unreadable.txt"
# Unreadable images, as a share of all, above which something else must be wrong, as a disk that fails. Ten may be.
MOST_UNREADABLE = 0.01
IMAGES_PER_TASK = 16
# By how a file begins: an extension may be wrong, and a data set's rows have none.
KINDS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"), (b"GIF8", "gif"))


class Packed(NamedTuple):
    """What goes into a shard for one image: the file and its extension; or why it cannot be read."""

    data: bytes
    extension: str
    problem: str = ""


def encode(source: ImageSource, index: int, short_side: int | None, quality: int) -> Packed:
    """One image as it is packed: see `write_shards`. Every image is decoded once, so that none is packed unreadable."""
    try:
        data = source.read_bytes(index)
        image = decode(data, min_side=0 if short_side else 1)
    except UnreadableImage as error:
        return Packed(b"", "", str(error))
    except ValueError as error:
        return Packed(b"", "", str(UnreadableImage(source.place(index), str(error))))
    height, width = image.shape[:2]
    if not short_side or min(height, width) <= short_side:
        return Packed(data, next((name for start, name in KINDS if data.startswith(start)), "jpg"))
    factor = short_side / min(height, width)
    size = (max(short_side, round(width * factor)), max(short_side, round(height * factor)))
    small = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return Packed(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes(), "jpg")


def write_shards(
    source: ImageSource,
    out: str | Path,
    short_side: int | None = None,
    quality: int = QUALITY,
    shard_size: int = 500_000_000,
    workers: int | None = None,
) -> tuple[int, list[str]]:
    """Pack the images of a source into the folder `out`, in the layout that `datasets/shard.py` describes.

    The order is that of the source. The folder appears whole or not at all, and does not depend on `workers`; one that
    already holds this pack is left as it is, with a line on stderr that says so.

    Args:
        out: folder to make; it must not exist, be empty, or hold the pack of the same names and settings.
        short_side: in pixels; images with a longer short side are resized to it. None copies all files as they are.
        quality: of the JPEGs that a resize makes, 1..100.
        shard_size: bytes at which a shard ends, unless one image is larger.
        workers: processes; None = one for each available core.

    Returns:
        The number of images packed, and `path: reason` of those left out, which `unreadable.txt` lists, too.

    Raises:
        ValueError: a setting out of range, an `out` that is a file or holds anything else, or no readable image.
        OSError: the folder cannot be written.
    """
    for field, value in (("short_side", short_side), ("shard_size", shard_size), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{field} is {value}: choose 1 or more")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}: choose 1 to 100")
    # Resolved, so that the temporary folder lies beside the real one also where `out` is a symlink.
    out = Path(out).expanduser().resolve()
    about = {
        "images": len(source),
        "content": _digest(source),
        "short_side": short_side,
        "quality": quality if short_side else None,
        "shard_size": shard_size,
    }
    if holds_already(out, INDEX, lambda path: read_index(str(path.parent))[1], about, "shards"):
        print(f"{out} already holds this pack: nothing to do", file=sys.stderr)
        record = out / UNREADABLE
        unreadable = record.read_text(encoding="utf-8").splitlines() if record.exists() else []
        return len(source) - len(unreadable), unreadable
    with whole_folder(out) as folder:
        tasks = -(-len(source) // IMAGES_PER_TASK)
        # Starting a process takes as long as some hundred images.
        processes = min(workers or available_cores(), -(-tasks // 8))
        starts = range(0, len(source), IMAGES_PER_TASK)
        images = spread(partial(_encode_from, source, short_side, quality), starts, processes)
        shards, unreadable = _write(source, chain.from_iterable(images), folder, shard_size)
        if not len(shards.names):
            raise ValueError(f"{source.origin}: none of its images can be read, the first being {unreadable[0]}")
        if len(unreadable) > max(10, MOST_UNREADABLE * len(source)):
            raise ValueError(
                f"{source.origin}: {len(unreadable):,} of {len(source):,} images cannot be read, more than "
                f"{100 * MOST_UNREADABLE:g} %, the first being {unreadable[0]}; nothing was written"
            )
        if unreadable:
            (folder / UNREADABLE).write_text("\n".join(unreadable) + "\n", encoding="utf-8")
        write_index(folder, shards, about)
    return len(shards.names), unreadable


def _encode_from(source: ImageSource, short_side: int | None, quality: int, start: int) -> list[Packed]:
    indices = range(start, min(start + IMAGES_PER_TASK, len(source)))
    return [encode(source, index, short_side, quality) for index in indices]


def _digest(source: ImageSource) -> str:
    """SHA-256 of what tells images from others: names and classes; of the files of a folder sizes and times; of an
    archive, tars or Hugging Face data the table of its members and where it lies."""
    text, ends = source.names.arrays()
    digest = hashlib.sha256(text.tobytes() + ends.tobytes() + "\0".join(source.classes).encode())
    digest.update(b"" if source.labels is None else source.labels.tobytes())
    if source.members is not None:
        digest.update(source.members.tobytes() + source.origin.encode())
    else:
        files = [os.stat(source.root / name) for name in source.names if (source.root / name).exists()]
        digest.update(np.array([(file.st_size, file.st_mtime_ns) for file in files], np.int64).tobytes())
    return digest.hexdigest()


def _write(source: ImageSource, images: Iterable[Packed], folder: Path, shard_size: int) -> tuple[Shards, list[str]]:
    files: list[str] = []
    kept: list[int] = []
    unreadable: list[str] = []
    table: list[tuple[int, int, int, int]] = []
    keys: set[str] = set()
    archive: tarfile.TarFile | None = None
    try:
        for index, (data, extension, problem) in enumerate(
            Progress(images, total=len(source), desc=f"packing {source.origin}", unit="image")
        ):
            if problem:
                unreadable.append(problem)
                continue
            if archive is None or (archive.offset and archive.offset + len(data) + 3 * BLOCK > shard_size):
                if archive is not None:
                    _close(archive)
                files.append(f"shard-{len(files):06d}.tar")
                archive = tarfile.open(  # noqa: SIM115 - closed below
                    folder / files[-1], "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
                )
            key = _key(source.names[index], index, keys)
            offset = _add(archive, f"{key}.{extension}", data)
            if source.labels is not None:
                _add(archive, f"{key}.cls", str(source.labels[index]).encode())
            kept.append(index)
            table.append((len(files) - 1, offset, len(data), zlib.crc32(data)))
    finally:
        if archive is not None:
            _close(archive)
    labels = None if source.labels is None else source.labels[kept]
    names = Names([source.names[index] for index in kept])
    places = tuple(str(folder / name) for name in files)
    return Shards(places, names, labels, source.classes, np.array(table, np.int64).reshape(-1, 4)), unreadable


def _key(name: str, index: int, taken: set[str]) -> str:
    """The path without extension and without further dots; where two are alike (`1.jpg`, `1.png`), with a number."""
    folder, slash, file = name.rpartition("/")
    stem = file.rpartition(".")[0] or file
    plain = key = folder + slash + stem.replace(".", "_")
    while key in taken:
        key = f"{plain}~{index}" if key == plain else f"{key}~"
    assert split_key(key + ".jpg") == (key, ".jpg")
    taken.add(key)
    return key


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file, alike whoever writes it and when. Returns where its data begin."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # a million entries that nobody will ask for
    return archive.offset - -(-len(data) // BLOCK) * BLOCK


def _close(archive: tarfile.TarFile) -> None:
    archive.close()
    with open(str(archive.name), "rb+") as file:
        os.fsync(file.fileno())
