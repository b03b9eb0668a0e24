"""Archives from the web: fetched with resume, and compared with their published checksums.

    archive = Archive("val2017.zip", 815_585_330, ("http://images.cocodataset.org/zips/val2017.zip",), "sha256:4f7e...")
    path = download(archive, Path("downloads"))  # a .partial file lies beside it until all of it is there

An interrupted download goes on where it stopped, by HTTP's Range (RFC 9110, section 14).
"""

import hashlib
import os
import re
import sys
import time
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from skipless.common.progress import Progress

TIMEOUT = 60.0
"""Seconds without a byte after which a server counts as gone."""
PAUSE = 2.0
"""Seconds before a dropped connection is taken up again."""

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """A file on the web."""

    name: str
    size: int
    """Bytes."""
    urls: tuple[str, ...]
    """Where it is, in the order in which they are tried; none where its owners' terms must be accepted first."""
    checksum: str | None = None
    """As published, "md5:..." or "sha256:..." in hexadecimal digits."""
    exact: bool = True
    """False where `size` is rounded, because the exact one is not published."""


class DamagedArchive(ValueError):
    """A file that is not what it should be: of another size or checksum, cut off, or with members that lead outside."""


class _Unavailable(Exception):
    """This address does not give the file; another one may."""


def download(archive: Archive, folder: Path, mirror: str | None = None) -> Path:
    """FOLDER/NAME, checked. What is there of FOLDER/NAME.partial is not fetched again.

    A connection that drops is taken up again as long as each one brings something; then the next address has its turn.

    Args:
        mirror: address of a folder that is asked first, for MIRROR/NAME.

    Raises ValueError, saying what to do by hand, where no address gives the right file.
    """
    path, partial = folder / archive.name, folder / f"{archive.name}.partial"
    if path.exists():
        return path  # it got its name after it had been checked
    urls = ((f"{mirror.rstrip('/')}/{archive.name}",) if mirror else ()) + archive.urls
    failures: list[str] = []
    for url in urls:
        if failures:
            print(f"{failures[-1]}; asking the next address", file=sys.stderr)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(url, archive, partial)
            verify(archive, partial)
        except _Unavailable as error:
            failures.append(f"{url}: {error}")
        except DamagedArchive as error:
            partial.unlink()
            failures.append(f"{url}: {error}; it was removed")
        else:
            partial.rename(path)
            return path
    raise ValueError(
        f"{archive.name} could not be had ({'; '.join(failures)}). Run the same command again later, or fetch "
        f"{archive.urls[0] if archive.urls else archive.name} by other means, and give the folder in which you put it "
        "as --archives FOLDER"
    )


def verify(archive: Archive, path: Path) -> None:
    """Raises DamagedArchive where size or checksum are not the published ones."""
    size = path.stat().st_size
    if archive.exact and size != archive.size:
        raise DamagedArchive(f"{path}: has {size:,} bytes, and {archive.name} has {archive.size:,}")
    if archive.checksum is None:
        return
    algorithm, _, expected = archive.checksum.partition(":")
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file, progress(f"checking {archive.name}", size) as bar:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    if digest.hexdigest() != expected:
        raise DamagedArchive(f"{path}: its {algorithm} is {digest.hexdigest()}, and {expected} was published")


def _fetch(url: str, archive: Archive, partial: Path) -> None:
    """Bring `partial` to its full length. Raises _Unavailable where this address does not."""
    if not url.startswith(("http://", "https://")):
        raise _Unavailable("is no http or https address")
    if archive.exact and partial.exists() and partial.stat().st_size > archive.size:
        partial.unlink()
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        if archive.exact and before == archive.size:
            return
        try:
            total = _receive(url, archive, partial, before)
            after = partial.stat().st_size
            if total is None or after >= total:
                return
            reason = f"sent {after:,} of {total:,} bytes"
        except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
            if isinstance(error, HTTPError):
                raise _Unavailable(f"answers {error.code} {error.reason}") from error
            after = partial.stat().st_size if partial.exists() else 0
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        if after <= before:
            raise _Unavailable(reason)
        time.sleep(PAUSE)


def _receive(url: str, archive: Archive, partial: Path, start: int) -> int | None:
    """One request: append to `partial` what the server sends from byte `start` on; from 0 where it cannot start there.

    Returns the file's total size, where the server says it.
    """
    headers = {"User-Agent": "skipless", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code != 416 or not start:
            raise
        # Nothing from there on: the file is complete already, or another one.
        if error.headers.get("Content-Range") == f"bytes */{start}":
            return start
        partial.unlink()
        return _receive(url, archive, partial, 0)
    with response:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdecimal() else None
        if start:
            sent = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if response.status == 206 and sent and int(sent[1]) == start:
                total = int(sent[2])
            elif response.status == 200:
                start = 0
            else:
                raise _Unavailable(f"was asked for the bytes from {start:,} on and sent others")
        if archive.exact and total is not None and total != archive.size:
            raise _Unavailable(f"has {total:,} bytes, and {archive.name} has {archive.size:,}")
        size = total or archive.size
        with open(partial, "ab" if start else "wb") as file, progress(archive.name, size, start) as bar:
            while chunk := _read(response):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        return total


def _read(response: Any) -> bytes:
    """Some bytes, none at the end. Errors of the network become ConnectionError: others are those of the disk."""
    try:
        return bytes(response.read1(_CHUNK))
    except OSError as error:
        raise ConnectionError(str(error) or type(error).__name__) from error


def progress(what: str, size: int, start: int = 0) -> Any:
    """A bar in bytes with the time that is left; in a log, lines with it."""
    return Progress(desc=what, total=size, initial=start, unit="B", unit_scale=True)
