"""Shards and their index: tars on disk or behind a URL, in which any image is one seek or one range request away.

`datasets/shard.py` writes `shards.npz` beside its shards, which says where every image lies; for tars without it, see
`tar.py`.
"""

import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skipless.common.files import write_atomically
from skipless.datasets.storage.folder import LARGEST
from skipless.datasets.storage.names import Names
from skipless.datasets.storage.remote import fetch, reason_of

INDEX = "shards.npz"
VERSION = 1


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
    remarks: tuple[str, ...] = ()
    """See `ImageSource`."""


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

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            # Compressed, since names resemble each other, and every process of a remote run fetches them.
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_atomically(folder / INDEX, write)


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
        shards, sizes, about = _parse_index(data)
    except Exception as error:  # zipfile's, zlib's and numpy's own
        raise ValueError(f"{path}: damaged index, or none of shards ({error}); pack the images again") from error
    if remote:
        shards = shards._replace(files=tuple(f"{place.rstrip('/')}/{name}" for name in shards.files))
        if len(shards.table):  # whatever is wrong with the server is wrong with all of them, and found out now
            try:
                read_shard_member(shards.files, *shards.table[0].tolist())
            except (OSError, ValueError) as error:
                first = shards.files[int(shards.table[0, 0])]
                raise ValueError(f"{first}: cannot read its first image ({reason_of(error)})") from None
        return shards, about
    files = tuple(str(Path(place, name)) for name in shards.files)
    for file, size in zip(files, sizes, strict=True):
        if not Path(file).is_file():
            raise ValueError(f"{file} is missing, and {INDEX} lists it: copy it again, or pack the images again")
        if Path(file).stat().st_size != size:
            raise ValueError(
                f"{file} has {Path(file).stat().st_size:,} bytes, and {INDEX} beside it says {size:,}: the shard is "
                "truncated, or the index is of other shards; copy all of them again, or pack the images again"
            )
    return shards._replace(files=files), about


def _parse_index(data: bytes) -> tuple[Shards, list[int], dict[str, Any]]:
    """Shards by their file names, the sizes of these files, and what the index is about. Raises whatever it raises."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > max(2**26, 200 * len(data)):
        raise ValueError(f"{len(data):,} bytes that unpack to {unpacked:,}")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        if int(arrays["version"]) != VERSION:
            raise ValueError(f"it has version {arrays['version']}, and this program reads {VERSION}")
        names, classes, files = (
            Names.from_arrays(arrays[f"{key}_bytes"], arrays[f"{key}_ends"]) for key in ("name", "class", "file")
        )
        labels = arrays["labels"].astype(np.int64) if "labels" in arrays else None
        table, sizes = arrays["table"].astype(np.int64), arrays["file_sizes"]
        about = json.loads(arrays["about"].tobytes())
    if table.shape != (len(names), 4) or len(sizes) != len(files) or (labels is not None and len(labels) != len(names)):
        raise ValueError("its tables do not fit each other")
    outside = len(table) and (table[:, :3].min() < 0 or table[:, 0].max() >= len(files))
    if len(table) and not outside:
        outside = (table[:, 2] > LARGEST).any() or (table[:, 1] > sizes[table[:, 0]] - table[:, 2]).any()
    if labels is not None and len(labels) and not (labels.min() >= 0 and labels.max() < len(classes)):
        outside = True
    if outside or any("/" in name or "\\" in name for name in files):
        raise ValueError("its tables point outside of the shards")
    return Shards(tuple(files), names, labels, tuple(classes), table), sizes.tolist(), about


def read_shard_member(files: Sequence[str], shard: int, offset: int, size: int, crc: int) -> bytes:
    """Bytes of one image. A file is opened, or a URL asked, anew each time: nothing to share between processes.

    Raises OSError, and ValueError for a shard that is truncated or is not the one that was listed.
    """
    place = files[shard]
    if size > LARGEST:
        raise ValueError(f"{place} has {size / 1e9:,.0f} GB at byte {offset:,}: no image")
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
