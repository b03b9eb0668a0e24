"""Names of images: which ones count, kept in little memory, and the classes that their folders are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Names(Sequence[str]):
    """Read-only sequence of strings in two buffers: a list of millions of `str` would cost ten times the memory, and be
    copied into every forked worker as its reference counts change."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._bytes = b"".join(encoded)
        self._ends = np.cumsum([0] + [len(name) for name in encoded])

    @classmethod
    def from_arrays(cls, text: np.ndarray, ends: np.ndarray) -> "Names":
        """From what `arrays` gave. Raises ValueError for buffers that do not fit each other."""
        if not len(ends) or ends[0] != 0 or ends[-1] != len(text) or (np.diff(ends) < 0).any():
            raise ValueError("its names are damaged")
        names = cls(())
        names._bytes, names._ends = text.astype(np.uint8).tobytes(), ends.astype(np.int64)
        return names

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The bytes of all names, uint8, and where each ends, int64 [N + 1] from 0."""
        return np.frombuffer(self._bytes, np.uint8), self._ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        positions = range(len(self))[index]  # raises IndexError as a list would
        if isinstance(positions, range):
            return [self[position] for position in positions]
        return os.fsdecode(self._bytes[self._ends[positions] : self._ends[positions + 1]])


def is_image(name: str) -> bool:
    """Whether a path below the root counts: an image by its extension, nothing hidden on the way."""
    return name.lower().endswith(EXTENSIONS) and not any(
        part.startswith(".") or part == "__MACOSX" for part in name.split("/")
    )


def plain(name: str) -> str:
    """Path of an archive's member as other writers would have written it: `.\\a\\b.png` and `/a//b.png` become
    `a/b.png`."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


def folder_classes(names: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Classes by the first folder of every path: labels, int64 [N], and sorted class names; None and () where an image
    lies in no folder, or all lie in one."""
    folders = [name.partition("/")[0] if "/" in name else "" for name in names]
    classes = tuple(sorted(set(folders)))
    if len(classes) < 2 or "" in classes:
        return None, ()
    number = {name: position for position, name in enumerate(classes)}
    return np.array([number[name] for name in folders], np.int64), classes


def dataset_name(path: Path) -> str:
    """A folder's name, or its parent's where it is only a split."""
    path = path.resolve()
    return path.parent.name if path.name in ("train", "val", "test") else path.stem
