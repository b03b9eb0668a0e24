"""Images of a folder, at any depth."""

import os
from pathlib import Path

from skipless.datasets.storage.names import is_image


def walk_images(root: Path) -> list[str]:
    """Images below a folder, unsorted. A link back to a folder that contains it is a loop, and not followed."""
    names: list[str] = []
    status = os.stat(root)
    todo = [("", frozenset([(status.st_dev, status.st_ino)]))]
    while todo:
        prefix, ancestors = todo.pop()
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
    return names
