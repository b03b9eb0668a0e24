"""Tar shards in WebDataset's format, on disk or behind a URL: any image by one seek or one range request.

A shard is an uncompressed tar. Files of one sample follow each other and share their key, the path up to the first dot
of the file name: `dog/1.jpg` is the image of the sample `dog/1`, `dog/1.cls` the number of its class
(https://github.com/webdataset/webdataset). `shards.npz`, which `datasets/shard.py` writes beside its shards, says where
every image lies; without it, the headers of the tars are read once.

The layout of headers is that of POSIX.1-2001 (pax), section "ustar Interchange Format", with GNU's long names. Python's
tarfile knows more of it, and is five times slower at listing.
"""

import importlib
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from skipless.datasets.storage.names import EXTENSIONS, Names, folder_classes, is_image, plain

INDEX = "shards.npz"
VERSION = 1
BLOCK = 512
# Hard and symbolic links, devices, folders, pipes: what their headers say of a size is not meant.
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
TRIES = 4
TIMEOUT = 60
"""Seconds without an answer from a web server."""


class Shards(NamedTuple):
    """The images of some shards."""

    files: tuple[str, ...]
    """Paths or URLs."""
    names: Names
    labels: np.ndarray | None
    classes: tuple[str, ...]
    """As in `ImageSource`."""
    table: np.ndarray
    """int64 [N, 4]: number of the shard, offset and size of the image in bytes, CRC-32 or -1 where it is not known."""


def write_index(folder: Path, shards: Shards, about: dict[str, Any]) -> None:
    """Write `shards.npz` into the folder that holds `shards.files`, with `about`, what JSON can hold, in it."""
    arrays: dict[str, np.ndarray] = {"version": np.array(VERSION), "table": shards.table}
    for key, names in (("name", shards.names), ("class", Names(shards.classes))):
        arrays[f"{key}_bytes"], arrays[f"{key}_ends"] = names.arrays()
    files = Names([Path(file).name for file in shards.files])
    arrays["file_bytes"], arrays["file_ends"] = files.arrays()
    arrays["file_sizes"] = np.array([(folder / name).stat().st_size for name in files], np.int64)
    if shards.labels is not None:
        arrays["labels"] = shards.labels
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    beside = folder / f".{INDEX}.{os.getpid()}"
    try:
        with open(beside, "wb") as file:
            # Compressed, since names resemble each other, and every process of a remote run fetches them.
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        os.replace(beside, folder / INDEX)
    finally:
        beside.unlink(missing_ok=True)


def read_index(place: str) -> tuple[Shards, dict[str, Any]]:
    """What `write_index` wrote into `place`, a folder or a URL.

    Raises ValueError for an index that is missing, damaged or of another version, and for shards on disk that are
    missing or of another size than it says.
    """
    remote = "://" in place
    path = f"{place.rstrip('/')}/{INDEX}" if remote else str(Path(place, INDEX))
    try:
        data = fetch(path) if remote else Path(path).read_bytes()
    except OSError as error:
        hint = ": shards behind a URL need the index that datasets/shard.py writes beside them" if remote else ""
        raise ValueError(f"{path}: cannot read this index ({reason_of(error)}){hint}") from error
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            if int(arrays["version"]) != VERSION:
                raise ValueError(f"it has version {arrays['version']}, and this program reads {VERSION}")
            names, classes, files = (
                Names.from_arrays(arrays[f"{key}_bytes"], arrays[f"{key}_ends"]) for key in ("name", "class", "file")
            )
            labels = arrays["labels"].astype(np.int64) if "labels" in arrays else None
            table, sizes = arrays["table"].astype(np.int64), arrays["file_sizes"]
            about = json.loads(arrays["about"].tobytes())
        if (
            table.shape != (len(names), 4)
            or len(sizes) != len(files)
            or (labels is not None and len(labels) != len(names))
        ):
            raise ValueError("its tables do not fit each other")
        outside = len(table) and (table[:, :3].min() < 0 or table[:, 0].max() >= len(files))
        if labels is not None and len(labels) and not (labels.min() >= 0 and labels.max() < len(classes)):
            outside = True
        if outside or any("/" in name or "\\" in name for name in files):
            raise ValueError("its tables point outside of the shards")
    except Exception as error:  # zipfile's, zlib's and numpy's own
        raise ValueError(f"{path}: damaged index, or none of shards ({error}); pack the images again") from error
    places = []
    for name, size in zip(files, sizes.tolist(), strict=True):
        if remote:
            places.append(f"{place.rstrip('/')}/{name}")
            continue
        shard = Path(place, name)
        if not shard.is_file():
            raise ValueError(f"{shard} is missing, and {INDEX} lists it: copy it again, or pack the images again")
        if shard.stat().st_size != size:
            raise ValueError(
                f"{shard} has {shard.stat().st_size:,} bytes, and {INDEX} beside it says {size:,}: the shard is "
                "truncated, or the index is of other shards; copy all of them again, or pack the images again"
            )
        places.append(str(shard))
    return Shards(tuple(places), names, labels, tuple(classes), table), about


def expand_braces(pattern: str) -> list[str]:
    """`a-{008..010}.tar` -> a-008.tar, a-009.tar, a-010.tar, as a shell does; several braces give all combinations."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found is None:
        return [pattern]
    first, last = found.groups()
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [before + number + rest for number in numbers for rest in expand_braces(after)]


def scan_shards(files: Sequence[str]) -> Shards:
    """List the images of tars that have no index, in their order: of every key the first file whose extension, all that
    follows the key, is an image's. A name is SHARD.tar/PATH.

    Classes are the numbers in `.cls` files where every image has one, else the folders inside the tars.

    Raises ValueError for a file that is no tar, or a truncated one; FileNotFoundError for a missing one.
    """
    names: list[str] = []
    paths: list[str] = []
    numbers: list[int] = []
    table: list[tuple[int, int, int, int]] = []
    for shard, place in enumerate(tqdm(files, desc="reading the headers of tars", unit="tar", disable=len(files) < 9)):
        if not Path(place).is_file():
            raise FileNotFoundError(f"{place}: no such tar")
        previous, tar = None, Path(place).name
        with open(place, "rb", buffering=0) as file:
            for raw, offset, size in _members(file, place):
                path = plain(os.fsdecode(raw))
                key, extension = split_key(path)
                if key != previous:
                    previous, has_image, number = key, False, -1
                if extension == ".cls" and size <= 20:
                    file.seek(offset)
                    text = file.read(size).strip()
                    number = int(text) if text.isdigit() else -1
                    if has_image:
                        numbers[-1] = number
                elif extension in EXTENSIONS and not has_image and is_image(path):
                    has_image = True
                    names.append(f"{tar}/{path}")
                    paths.append(path)
                    numbers.append(number)
                    table.append((shard, offset, size, -1))
    found = np.array(table, np.int64).reshape(-1, 4)
    values = sorted(set(numbers))
    if len(values) > 1 and values[0] >= 0:
        labels: np.ndarray | None = np.searchsorted(values, numbers).astype(np.int64)
        classes = tuple(map(str, values))
    else:
        labels, classes = folder_classes(paths)
    return Shards(tuple(files), Names(names), labels, classes, found)


def split_key(path: str) -> tuple[str, str]:
    """`a.b/c.seg.PNG` -> `a.b/c` and `.seg.png`: WebDataset's key, and what it takes for the extension."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def _members(file: BinaryIO, place: str) -> Iterator[tuple[bytes, int, int]]:
    """Path, offset and size of every regular file in a tar. The caller may move in the file meanwhile."""
    end, position = file.seek(0, os.SEEK_END), 0
    path, size_of_next = b"", -1  # from extended headers, for the next member
    while position < end:
        file.seek(position)
        header = file.read(BLOCK)
        if not header.strip(b"\0") and len(header) == BLOCK:  # the end mark
            return
        try:
            size = _number(header[124:136])
            # The checksum is the sum of the header's bytes, its own eight taken for spaces.
            whole = len(header) == BLOCK
            fits = whole and size >= 0 and sum(header) - sum(header[148:156]) + 8 * 32 == _number(header[148:156])
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{place}: no tar header at byte {position:,}: the file is truncated, damaged, compressed, or no tar"
            )
        kind = header[156:157]
        extended = kind in (b"x", b"L")
        if size_of_next >= 0 and not extended:
            size = size_of_next
        data = position + BLOCK
        position = data + (0 if kind in WITHOUT_DATA else -(-size // BLOCK) * BLOCK)
        if position > end:
            raise ValueError(f"{place}: truncated at byte {end:,}, inside a member: copy or download it again")
        if extended:
            file.seek(data)
            content = file.read(size)
            if kind == b"L":
                path = content.partition(b"\0")[0]
            else:
                records = _pax_records(content, place)
                path = records.get(b"path", path)
                digits = records.get(b"size", b"-1")
                if not digits.isdigit() and digits != b"-1":
                    raise ValueError(f"{place}: damaged extended header")
                size_of_next = int(digits)
            continue
        if kind in (b"g", b"K"):  # for all members, or for the target of a link
            continue
        if kind in (b"0", b"\0", b"7"):
            name = header[:100].partition(b"\0")[0]
            prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
            name = path or (prefix + b"/" + name if prefix else name)
            if not name.endswith(b"/"):  # which was a folder, before there were types
                yield name, data, size
        path, size_of_next = b"", -1


def _number(field: bytes) -> int:
    """Octal digits, or, for what is too large, GNU's base 256."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def _pax_records(content: bytes, place: str) -> dict[bytes, bytes]:
    """Records `LENGTH KEY=VALUE\\n`, where LENGTH counts itself."""
    records = {}
    while content.strip(b"\0"):
        digits, space, _ = content.partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not space or length <= len(digits) or length > len(content):
            raise ValueError(f"{place}: damaged extended header")
        key, _, value = content[len(digits) + 1 : length - 1].partition(b"=")
        records[key] = value
        content = content[length:]
    return records


def read_shard_member(files: Sequence[str], shard: int, offset: int, size: int, crc: int) -> bytes:
    """Bytes of one image. A file is opened, or a URL asked, anew each time: nothing to share between processes.

    Raises OSError, and ValueError for a shard that is truncated or is not the one that was listed.
    """
    place = files[shard]
    if "://" in place:
        data = fetch(place, offset, size)
    else:
        with open(place, "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{place} is truncated: it ends inside this image")
    if crc >= 0 and zlib.crc32(data) != crc:
        raise ValueError(
            f"{place} is damaged, or the index is of other shards: the checksum of byte {offset:,} on differs"
        )
    return data


def fetch(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes of a URL from `offset` on, or all of it; http and https by Python itself, others (s3, gs, ...) by
    fsspec, with the settings and credentials of its own files. Tries again for some seconds where the failure may pass.

    Raises FileNotFoundError, and OSError with what the server or fsspec said.
    """
    for attempt in range(TRIES):
        try:
            return (
                _fetch_http(url, offset, size) if url.startswith(("http://", "https://")) else _fetch(url, offset, size)
            )
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(f"HTTP {error.code}: not there") from None
            if attempt == TRIES - 1 or (error.code < 500 and error.code not in (408, 429)):
                raise OSError(f"HTTP {error.code} {error.reason}") from None
        except (FileNotFoundError, PermissionError, _Refused):
            raise
        except Exception as error:  # every storage has classes of its own
            if attempt == TRIES - 1 or isinstance(error, ImportError | ValueError):
                raise OSError(reason_of(error)) from error
        time.sleep(0.5 * 2**attempt)
    raise AssertionError


class _Refused(OSError):
    """Trying again would not help."""


def _fetch_http(url: str, offset: int, size: int | None) -> bytes:
    headers = {} if size is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
    if size == 0:
        return b""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if size is not None and answer.status != 206:
            raise _Refused("the web server gives whole files only: it must support range requests")
        return bytes(answer.read())


def _fetch(url: str, offset: int, size: int | None) -> bytes:
    core: Any = importlib.import_module("fsspec.core")  # comes with torch
    # Looked up anew each time: fsspec keeps one instance a process and thread, which none must inherit by a fork.
    filesystem, path = core.url_to_fs(url)
    return bytes(filesystem.cat_file(path, start=offset, end=None if size is None else offset + size))


def reason_of(error: Exception) -> str:
    """The first line of what an exception says."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]
