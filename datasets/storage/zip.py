"""Members of a zip archive, read in place by any number of processes."""

import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from skipless.datasets.storage.folder import LARGEST
from skipless.datasets.storage.names import OTHER_IMAGES, is_image, plain


def list_archive(path: Path) -> tuple[list[str], np.ndarray, Counter[str]]:
    """Sorted names of the images in a zip archive; int64 [N, 5]: offset of the local header, compressed size, size,
    method, CRC-32; and how many files there are of kinds that are not read, by extension.

    Raises ValueError for what is no zip archive or a damaged one, and for images that are encrypted or compressed
    otherwise than by deflate.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {plain(info.filename): info for info in archive.infolist() if not info.is_dir()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, EOFError, ValueError, struct.error) as error:
        if path.suffix.lower() == ".zip":
            raise ValueError(f"{path}: damaged zip archive ({error})") from error
        raise ValueError(
            f"{path}: is a file, but not a zip archive; give a folder, a .zip or a .tar of images"
        ) from error
    names = sorted(filter(is_image, members))
    table = []
    for name in names:
        info = members[name]
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"{path}: {name} is encrypted or compressed by a method other than deflate; "
                "write the archive again, stored or with deflate"
            )
        table.append((info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC))
    others = Counter(os.path.splitext(name)[1].lower() for name in members if name.lower().endswith(OTHER_IMAGES))
    return names, np.array(table, np.int64).reshape(-1, 5), others


def read_zip_member(archive: Path, offset: int, compressed_size: int, size: int, method: int, crc: int) -> bytes:
    """Bytes of one member. The archive is opened anew each time (microseconds): nothing to share between processes.
    Raises ValueError for a damaged archive.

    Python's zipfile would parse the whole directory again in every worker: seconds, and half a kilobyte a member.
    """
    if max(size, compressed_size) > LARGEST:
        raise ValueError(f"it has {max(size, compressed_size) / 1e9:,.1f} GB by the archive's directory: no image")
    with open(archive, "rb") as file:
        file.seek(offset)
        header = file.read(30)
        if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
            raise ValueError("damaged zip archive (no header where its directory points)")
        file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
        data = file.read(compressed_size)
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # a bomb would go on
        except zlib.error as error:
            raise ValueError(f"damaged zip archive ({error})") from error
    if len(data) != size or zlib.crc32(data) != crc:
        raise ValueError("damaged zip archive (its checksum does not match)")
    return data
