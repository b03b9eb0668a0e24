"""Bytes behind a URL, all of them or a range: http and https by Python itself, s3, gs and others by fsspec."""

import importlib
import time
import urllib.error
import urllib.request
from typing import Any

TRIES = 4
MOST = 2**32  # bytes of a whole file: an index of shards has 50 for each image
TIMEOUT = 60
"""Seconds without an answer from a web server."""


class Refused(OSError):
    """Trying again would not help."""


def fetch(url: str, offset: int = 0, size: int | None = None) -> bytes:
    """`size` bytes of a URL from `offset` on, or all of it; fsspec uses the credentials of its own files. Tries again
    for some seconds where the failure may pass.

    Raises FileNotFoundError, and OSError with what the server or fsspec said.
    """
    receive = _fetch_http if url.startswith(("http://", "https://")) else _fetch_other
    for attempt in range(TRIES):
        try:
            return receive(url, offset, size)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                raise FileNotFoundError(f"HTTP {error.code}: not there") from None
            if attempt == TRIES - 1 or (error.code < 500 and error.code not in (408, 429)):
                raise OSError(f"HTTP {error.code} {error.reason}") from None
        except (FileNotFoundError, PermissionError, Refused):
            raise
        except Exception as error:  # every storage has classes of its own
            if attempt == TRIES - 1 or isinstance(error, ImportError | ValueError):
                raise OSError(reason_of(error)) from error
        time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _fetch_http(url: str, offset: int, size: int | None) -> bytes:
    if size == 0:
        return b""
    headers = {} if size is None else {"Range": f"bytes={offset}-{offset + size - 1}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
        if size is not None and answer.status != 206:
            raise Refused("the web server gives whole files only: it must support range requests")
        data = bytes(answer.read(MOST + 1 if size is None else size))
        if size is None and len(data) > MOST:
            raise Refused(f"it has more than {MOST / 1e9:.0f} GB")
        return data


def _fetch_other(url: str, offset: int, size: int | None) -> bytes:
    core: Any = importlib.import_module("fsspec.core")  # comes with torch
    # Looked up anew each time: fsspec keeps one instance a process and thread, which none must inherit by a fork.
    filesystem, path = core.url_to_fs(url)
    return bytes(filesystem.cat_file(path, start=offset, end=None if size is None else offset + size))


def reason_of(error: Exception) -> str:
    """The first line of what an exception says."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return str(text).splitlines()[0]
