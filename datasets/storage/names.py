"""Names of images: which ones count, kept in little memory, and the classes that their folders are."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
OTHER_IMAGES = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".psd", ".svg", ".exr", ".hdr", ".tga", ".ppm", ".pgm", ".dng", ".cr2",
    ".cr3", ".nef", ".arw", ".raw", ".dcm",
)  # fmt: skip
"""What is an image, too, and is not read: said, where it lies beside images."""
# Folders in which data sets keep label masks: VOC's, ADE20K's, COCO-Stuff's, Cityscapes'.
MASKS = (
    "SegmentationClass", "SegmentationClassAug", "SegmentationObject", "annotations", "stuffthingmaps",
    "stuffthingmaps_trainval2017", "gtFine", "gtCoarse",
)  # fmt: skip


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


def without_masks(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Rows of the paths that are no label masks, int64 [n], and the folders of those that are: PNG files in a folder
    that a data set calls so, beside other images. Masks alone are taken for images, as somebody asked for them."""
    folders = [next((part for part in name.split("/")[:-1] if part in MASKS), "") for name in names]
    mask = np.array([bool(folder) and name.endswith(".png") for name, folder in zip(names, folders, strict=True)], bool)
    if mask.all():
        return np.arange(len(names)), ()
    return np.flatnonzero(~mask), tuple(sorted({folders[row] for row in np.flatnonzero(mask)}))


def remarks(names: Sequence[str], masks: int, folders: Sequence[str], others: Counter[str]) -> list[str]:
    """Sentences where the images may be others, or fewer, than were meant.

    Args:
        names: paths of the images; masks, folders: how many label masks were left out, and from which folders.
        others: files of kinds that are not read, by extension.
    """
    said = []
    if masks:
        said.append(f"{masks:,} label masks in {', '.join(folders)} are left out")
    if others:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
        said.append(f"left out, as these kinds are not read: {kinds}; convert them to JPEG or PNG")
    first = Counter(name.partition("/")[0] for name in names if "/" in name)
    splits = [name for name in ("train", "training", "val", "valid", "validation", "test") if first[name]]
    if len(splits) > 1:
        counts = " and ".join(f"{first[name]:,} images of {name}/" for name in splits)
        said.append(f"{counts} are all taken, what others measure on among them: for one alone give its folder")
    return said
