"""Archives unpacked without surprises: a member that would be written outside the folder refuses the whole archive.

unpack(Path("val2017.zip"), Path("unpacked"), keep=lambda name: name.endswith(".jpg"))
"""

import gzip
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from skipless.datasets.public.downloads import DamagedArchive, progress


def unpack(path: Path, folder: Path, keep: Callable[[str], bool] = lambda name: True) -> None:
    """Unpack a .zip, or a tar with or without compression, into a folder, which is made.

    Args:
        keep: says by a member's name whether it is wanted.

    Raises DamagedArchive for a cut-off or damaged archive, and for one in which any member, wanted or not, has an
    absolute path or `..` in it, is a link out of the folder, or is no file, folder or link at all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "rb") as file, progress(f"unpacking {path.name}", path.stat().st_size) as bar:
        if path.suffix == ".zip":
            _unpack_zip(file, path, folder, keep, bar)
        else:
            unpack_tar(file, str(path), folder, keep, bar)


def unpack_tar(
    file: IO[bytes], label: str, folder: Path, keep: Callable[[str], bool] = lambda name: True, bar: Any = None
) -> None:
    """As `unpack`, from an open tar, which may be a member of another.

    Args:
        label: for messages.
        bar: that follows the position in the file.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("unpacking tar files safely needs Python 3.11.4 or newer")
    try:
        with tarfile.open(fileobj=file, mode="r:*") as tar:
            for member in tar:
                _require_inside(member.name, label)
                if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
                    raise DamagedArchive(f"{label}: {member.name} is a device or pipe; such an archive is not unpacked")
                if member.issym() or member.islnk():
                    tarfile.data_filter(member, str(folder))  # raises for links that lead outside
                if keep(member.name):
                    tar.extract(member, folder, filter="data")
                if bar is not None:
                    bar.update(file.tell() - bar.n)
    except tarfile.FilterError as error:
        raise DamagedArchive(f"{label}: {error}; such an archive is not unpacked") from error
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DamagedArchive(f"{label}: damaged or cut off ({error})") from error


def _unpack_zip(file: IO[bytes], path: Path, folder: Path, keep: Callable[[str], bool], bar: Any) -> None:
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            for member in members:
                _require_inside(member.filename, str(path))
                if stat.S_ISLNK(member.external_attr >> 16):  # no data set has one
                    raise DamagedArchive(f"{path}: {member.filename} is a link; such an archive is not unpacked")
            for member in members:
                if keep(member.filename):
                    archive.extract(member, folder)
                bar.update(member.compress_size)
    except (zipfile.BadZipFile, EOFError, zlib.error, struct.error, RuntimeError) as error:  # the last: encrypted
        raise DamagedArchive(f"{path}: damaged or cut off ({error})") from error


def _require_inside(name: str, label: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or re.match("[A-Za-z]:", name) or ".." in parts:
        raise DamagedArchive(f"{label}: {name} leads out of the folder; such an archive is not unpacked")
