"""Tars in WebDataset's format that have no index: their headers are read once, to find every image.

Files of one sample follow each other and share their key, the path up to the first dot of the file name: `dog/1.jpg`
is the image of the sample `dog/1`, `dog/1.cls` the number of its class (https://github.com/webdataset/webdataset).

The layout of headers is that of POSIX.1-2001 (pax), section "ustar Interchange Format", with GNU's long names. Python's
tarfile knows more of it, and is five times slower at listing.
"""

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from skipless.common.progress import Progress
from skipless.datasets.storage.names import EXTENSIONS, Names, folder_classes, is_image, plain
from skipless.datasets.storage.shards import Shards

BLOCK = 512
BRACES = r"\{(\d{1,18})\.\.(\d{1,18})\}"
MOST_TARS = 100_000
# Hard and symbolic links, devices, folders, pipes: what their headers say of a size is not meant.
WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")


def expand_braces(pattern: str) -> list[str]:
    """`a-{008..010}.tar` -> a-008.tar, a-009.tar, a-010.tar, as a shell does; several braces give all combinations.

    Raises ValueError for more than MOST_TARS names.
    """
    count = math.prod(int(last) - int(first) + 1 for first, last in re.findall(BRACES, pattern))
    if count > MOST_TARS:
        raise ValueError(f"{pattern} names {count:,} tars: at most {MOST_TARS:,} are opened; check the range")
    brace = re.search(BRACES, pattern)
    if brace is None:
        return [pattern]
    first, last = brace.groups()
    numbers = (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))
    before, after = pattern[: brace.start()], pattern[brace.end() :]
    return [before + number + rest for number in numbers for rest in expand_braces(after)]


def scan_shards(files: Sequence[str]) -> Shards:
    """List the images of tars that have no index, in their order: of every key the first file whose extension, all that
    follows the key, is an image's; where it has none such, all files that end as images do: their names merely have
    dots. A name is SHARD.tar/PATH.

    Classes are the numbers in `.cls` files where every image has one, else the folders inside the tars.

    Raises ValueError for a file that is no tar, or a truncated one; FileNotFoundError for a missing one.
    """
    samples: list[Sample] = []
    table: list[tuple[int, int, int, int]] = []
    left_out = 0
    for shard, place in enumerate(
        Progress(files, desc="reading the headers of tars", unit="tar", active=len(files) >= 9)
    ):
        if not Path(place).is_file():
            raise FileNotFoundError(f"{place}: no such tar")
        with open(place, "rb", buffering=0) as file:
            images = []
            for sample in _samples(file, place):
                left_out += len(sample.dotted) if sample.path else 0
                images += [sample] if sample.path else [replace(one, number=sample.number) for one in sample.dotted]
        samples += images
        table += [(shard, image.offset, image.size, -1) for image in images]
    paths, numbers = [image.path for image in samples], [image.number for image in samples]
    values = sorted(set(numbers))
    if len(values) > 1 and values[0] >= 0:
        labels: np.ndarray | None = np.searchsorted(values, numbers).astype(np.int64)
        classes = tuple(map(str, values))
    else:
        labels, classes = folder_classes(paths)
    places = np.array(table, np.int64).reshape(-1, 4)
    names = Names([f"{Path(files[shard]).name}/{path}" for (shard, *_), path in zip(table, paths, strict=True)])
    said = f"{left_out:,} images belong to another image by WebDataset's naming (x.seg.png to x.jpg) and are left out"
    return Shards(tuple(files), names, labels, classes, places, (said,) if left_out else ())


@dataclass(slots=True)
class Sample:
    """Files that share a key."""

    key: str
    path: str = ""
    """Of the image in the tar; empty as long as there is none."""
    offset: int = 0
    size: int = 0
    number: int = -1
    """Of its class, -1 where it has none."""
    dotted: list["Sample"] = field(default_factory=list)
    """Files with more dots in their names that end as images do: images by themselves, unless there is `path`."""


def _samples(file: BinaryIO, place: str) -> Iterator[Sample]:
    """The samples of a tar, those without an image among them."""
    sample: Sample | None = None
    for raw, offset, size in members(file, place):
        path = plain(os.fsdecode(raw))
        key, extension = split_key(path)
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key)
        if extension == ".cls" and size <= 20:
            file.seek(offset)
            text = file.read(size).strip()
            sample.number = int(text) if text.isdigit() else -1
        elif extension in EXTENSIONS and not sample.path and is_image(path):
            sample.path, sample.offset, sample.size = path, offset, size
        elif is_image(path):
            sample.dotted.append(Sample(key, path, offset, size))
    if sample is not None:
        yield sample


def split_key(path: str) -> tuple[str, str]:
    """`a.b/c.seg.PNG` -> `a.b/c` and `.seg.png`: WebDataset's key, and what it takes for the extension."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def members(file: BinaryIO, place: str) -> Iterator[tuple[bytes, int, int]]:
    """Path, offset and size of every regular file in a tar. The caller may move in the file meanwhile.

    Args:
        place: for messages.

    Raises ValueError where a header is damaged or the end is missing.
    """
    end, position = file.seek(0, os.SEEK_END), 0
    path, size_of_next = b"", -1  # from extended headers, for the next member
    while position < end:
        file.seek(position)
        header = file.read(BLOCK)
        if not header.strip(b"\0") and len(header) == BLOCK:  # the end mark
            return
        size = _checked_size(header)
        if size < 0:
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
        if kind == b"L":
            file.seek(data)
            path = file.read(size).partition(b"\0")[0]
        elif kind == b"x":
            file.seek(data)
            records = _pax_records(file.read(size), place)
            path, size_of_next = records.get(b"path", path), int(records.get(b"size", b"-1"))
        elif kind not in (b"g", b"K"):  # those are for all members, or for the target of a link
            name = path or _header_name(header)
            if kind in (b"0", b"\0", b"7") and not name.endswith(b"/"):  # which was a folder, before there were types
                yield name, data, size
            path, size_of_next = b"", -1


def _checked_size(header: bytes) -> int:
    """The size that a header gives; -1 for what is no header."""
    try:
        # The checksum is the sum of the header's bytes, its own eight taken for spaces.
        whole = len(header) == BLOCK and sum(header) - sum(header[148:156]) + 8 * 32 == header_number(header[148:156])
        return max(header_number(header[124:136]), -1) if whole else -1
    except ValueError:
        return -1


def _header_name(header: bytes) -> bytes:
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def header_number(field: bytes) -> int:
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
        key, _, value = content[len(digits) + 1 : length - 1].partition(b"=")
        bad_size = key == b"size" and not value.isdigit()
        if not space or length <= len(digits) or length > len(content) or bad_size:
            raise ValueError(f"{place}: damaged extended header")
        records[key] = value
        content = content[length:]
    return records
