"""Images with a class label for every pixel: what a segmentation data set is here, whoever made it.

    val = voc_segmentation("data/VOCdevkit", "val")  # of voc.py; coco.py, ade20k.py and more have others
    image, mask = val.read(0)  # uint8 [H, W, 3] and uint8 [H, W]
    val.classes[mask[0, 0]]  # unless mask[0, 0] == VOID

Masks are label maps in PNG files. Their values are read as they are stored: a palette only says how to show them.
Masks and boxes are drawn on the pixels as stored, so images are read with `read_stored`, which leaves an EXIF
orientation aside, where `skipless.datasets.images.read_image` would turn the picture under its labels.
"""

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from skipless.datasets.images import UnreadableImage, read_image
from skipless.datasets.storage.decode import PILLOW_FORMATS, require_memory
from skipless.datasets.storage.folder import read_file

VOID = 255
"""Label of pixels that are ignored: neither trained on nor scored."""


@dataclass(frozen=True, eq=False)
class SegmentationSet:
    """N images with their masks. Holds no open file: it can be pickled, forked and used from several threads."""

    name: str
    """"voc12", "coco-stuff-27", "ade20k" and so on, or one's own folder's."""
    split: str
    names: tuple[str, ...]
    """[N] image ids in the list's order."""
    images: tuple[Path, ...]
    """[N] image files."""
    masks: tuple[Path, ...]
    """[N] label files: 8-bit gray or palette PNG."""
    classes: tuple[str, ...]
    """[C] class names in label order."""
    colors: np.ndarray
    """uint8 [C, 3] RGB, to show labels with."""
    labels: np.ndarray
    """int16 [256], the label of each value in a file: 0..C-1, VOID where it is ignored, -1 where it must not occur."""
    convention: str = ""
    """What the values mean as the authors give them, for messages."""

    def __post_init__(self) -> None:
        """Raises FileNotFoundError where a file of the set is missing, naming the first and how many there are."""
        require_files(self.images, "image")
        require_files(self.masks, "mask")

    def __len__(self) -> int:
        return len(self.names)

    def read_image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB, pixels as stored (see `read_stored`). Raises UnreadableImage."""
        return read_stored(self.images[index])

    def read_mask(self, index: int) -> np.ndarray:
        """uint8 [H, W], labels 0..C-1 or VOID. Raises UnreadableImage, also for a value that must not occur."""
        values = read_values(self.masks[index])
        labels = self.labels[values]
        if labels.min() < 0:
            wrong = values[labels < 0]
            allowed = np.flatnonzero(self.labels >= 0)
            raise UnreadableImage(
                self.masks[index],
                f"{wrong.size} of {values.size} pixels hold {_ranges(np.unique(wrong))}, where {self.name} masks hold "
                f"{_ranges(allowed)}{self.convention and f' ({self.convention})'}; check that this is the label file "
                f"of {self.name}",
            )
        return labels.astype(np.uint8)

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`read_image` and `read_mask`. Raises UnreadableImage, also where the two differ in size."""
        image, mask = self.read_image(index), self.read_mask(index)
        self._require_size(index, mask, image.shape[0], image.shape[1])
        return image, mask

    def read_matched_mask(self, index: int) -> np.ndarray:
        """`read_mask`, its size compared with what the image's header says: faster than reading both."""
        mask = self.read_mask(index)
        try:
            with Image.open(self.images[index], formats=PILLOW_FORMATS) as header:
                width, height = header.size
        except Exception as error:  # Pillow raises what its parsers raise
            raise UnreadableImage(self.images[index], f"damaged image ({error or type(error).__name__})") from error
        self._require_size(index, mask, height, width)
        return mask

    def values_seen(self, count: int = 32) -> set[int]:
        """The values that so many masks hold, evenly spread over the set; of unreadable ones none."""
        seen: set[int] = set()
        for index in np.unique(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int)).tolist():
            with contextlib.suppress(UnreadableImage):  # reading it will say so
                seen |= set(np.unique(read_values(self.masks[index])).tolist())
        return seen

    def _require_size(self, index: int, mask: np.ndarray, height: int, width: int) -> None:
        if mask.shape != (height, width):
            raise UnreadableImage(
                self.masks[index],
                f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels and its image {self.images[index]} "
                f"{width} x {height}; both must be the originals, neither resized nor turned",
            )


def label_table(first: int, count: int, void: Sequence[int] = ()) -> np.ndarray:
    """int16 [256] for `SegmentationSet.labels`: the values `first`, `first` + 1, ... are the labels 0..`count` - 1, the
    values in `void` are ignored, others must not occur."""
    labels = np.full(256, -1, np.int16)
    labels[first : first + count] = np.arange(count)
    labels[list(void)] = VOID
    return labels


def read_stored(path: str | Path) -> np.ndarray:
    """One image file as uint8 [H, W, 3] RGB, as `images.read_image` but for the EXIF orientation, which is not applied:
    masks and boxes refer to stored pixels. Raises UnreadableImage."""
    image = read_image(path)
    try:
        with Image.open(path, formats=PILLOW_FORMATS) as opened:
            if opened.getexif().get(0x0112, 1) not in range(2, 9):
                return image
            return np.array(opened.convert("RGB"))
    except Exception:  # damaged metadata: read_image has ignored them as well
        return image


def read_values(path: str | Path) -> np.ndarray:
    """The values stored in an 8-bit gray or a palette PNG, uint8 [H, W]: indices, not the palette's colors.

    Raises UnreadableImage for a missing, damaged or truncated file and for other kinds of image. Gray PNG of 1, 2 or 4
    bits are among them: their writers disagree on whether the values or the shades (value 1 of 2 bits is shade 85) are
    meant.
    """
    try:
        data = read_file(path)
    except OSError as error:
        raise UnreadableImage(path, error.strerror or str(error)) from error
    if not data:
        raise UnreadableImage(path, "the file is empty")
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 26:
        raise UnreadableImage(path, "masks must be PNG files, and the content is not that of one")
    bits, kind = data[24], data[25]  # PNG specification, 11.2.1: bit depth and color type
    if kind != 3 and (kind, bits) != (0, 8):
        color = {0: "gray", 2: "RGB", 4: "gray and alpha", 6: "RGBA"}.get(kind, f"color type {kind}")
        raise UnreadableImage(
            path, f"masks must be 8-bit gray or palette PNG files, and this one is {bits}-bit {color}"
        )
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            require_memory(*opened.size)
            return np.array(opened)
    except Exception as error:  # Pillow raises what its parsers raise: struct.error, SyntaxError, zlib.error, ...
        raise UnreadableImage(path, f"damaged or truncated PNG ({error or type(error).__name__})") from error


def read_names(path: Path) -> tuple[str, ...]:
    """The names in a list file, one a line; blank lines and spaces around names are left out.

    Raises FileNotFoundError for a missing list, ValueError for one that is empty, no text, names something twice, or
    has lines of several words (VOC's lists of one class, say, where a second column says whether the class is there).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such list of names") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a list of names ({error})") from error
    names: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(words) > 1:
            raise ValueError(f"{path}, line {number}: holds {len(words)} words; give a list of one name a line")
        if words[0] in names:
            raise ValueError(f"{path}, line {number}: {words[0]} is named twice, first in line {names[words[0]]}")
        names[words[0]] = number
    if not names:
        raise ValueError(f"{path}: the list is empty")
    return tuple(names)


def list_folder(folder: Path) -> set[str]:
    """Names of what lies in a folder, none where there is no such folder. Raises ValueError where it is unreadable."""
    try:
        return set(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise ValueError(f"{folder}: cannot list this folder ({error.strerror})") from error


def require_files(paths: Sequence[Path], what: str) -> None:
    """Raises FileNotFoundError where a file is missing, naming the first and how many there are. `what` they are, for
    the message. Lists each folder once: a hundred thousand look-ups would take minutes on a network file system."""
    present = {folder: list_folder(folder) for folder in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in present[path.parent]]
    if missing:
        count = f"{len(missing)} of {len(paths)} {what} files are missing"
        raise FileNotFoundError(f"{missing[0]}: no such {what} ({count})")


def paired_names(images: Path, masks: Path) -> tuple[str, ...]:
    """Sorted names that occur as NAME.jpg in one folder or as NAME.png in the other. Those that are not in both are
    among them, so that a set that was copied in part is found out. Raises FileNotFoundError where there is none."""
    names = {name[:-4] for name in list_folder(images) if name.endswith(".jpg") and not name.startswith(".")}
    names |= {name[:-4] for name in list_folder(masks) if name.endswith(".png") and not name.startswith(".")}
    if not names:
        raise FileNotFoundError(f"{images}: holds no .jpg images, and {masks} no .png masks")
    return tuple(sorted(names))


def distinct_colors(count: int) -> np.ndarray:
    """uint8 [count, 3] RGB for sets whose authors give none, `count` at most 210: no grays, and any two at least 51
    apart in some channel; the first 27 are farther from each other."""
    # A lattice of 6 x 6 x 6 colors, every 49th in turn; multiples of 43 = 36 + 6 + 1 are the grays.
    index = np.arange(216) * 49 % 216
    index = index[index % 43 > 0][:count]
    return (51 * np.stack([index // 36, index // 6 % 6, index % 6], axis=1)).astype(np.uint8)


def _ranges(values: np.ndarray) -> str:
    """Sorted integers as text: 0-20, 255."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
