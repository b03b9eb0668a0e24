"""Images of a folder, at any depth."""

import os
import stat
from collections import Counter
from pathlib import Path

from skipless.datasets.storage.names import OTHER_IMAGES, is_image

LARGEST = 2**30
"""Bytes of an image file. No photograph has more; a damaged table, a link to a device or a zip bomb may."""
CROSSWISE = 1000  # visits from which on folders that are reached too often are taken for a tangle of links


def walk_images(root: Path) -> tuple[list[str], Counter[str]]:
    """Images below a folder, unsorted, and how many files there are of kinds that are not read, by extension. A link
    back to a folder that contains it is a loop, and not followed.

    Raises ValueError for a folder that cannot be listed, and for folders that are linked crosswise.
    """
    names: list[str] = []
    others: Counter[str] = Counter()
    status = os.stat(root)
    todo = [("", frozenset([(status.st_dev, status.st_ino)]))]
    visits, distinct = 0, set[tuple[int, int]]()
    while todo:
        prefix, ancestors = todo.pop()
        visits, distinct = visits + 1, distinct | ancestors
        if visits > max(CROSSWISE, 10 * len(distinct)):
            raise ValueError(f"{root}: links lead to the same folders again and again, as in {prefix}: remove some")
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
            elif entry.name.lower().endswith(OTHER_IMAGES):
                others[os.path.splitext(entry.name)[1].lower()] += 1
    return names, others


def read_file(path: str | Path) -> bytes:
    """The content of a regular file: a pipe would block, and a device never end.

    Raises OSError, also for what is no regular file and for more than LARGEST bytes.
    """
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("not a regular file")
        if status.st_size > LARGEST:
            raise OSError(f"the file has {status.st_size / 1e9:,.0f} GB, too many for an image")
        return file.read()
