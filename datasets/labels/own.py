"""Segmentation sets of one's own: a folder of images and a folder of masks.

    mask_folder("photos", "val")

    photos/images/NAME.jpg      or any other format of images
           masks/NAME.png       8-bit gray or palette: a class for every pixel, 255 where there is none
           classes.txt          names of classes, one a line, the first for the value 0; empty for values not in use

Without classes.txt, the values that the masks hold are the classes. Where there are folders train/ and val/ with
images/ and masks/ each, they are the splits; else every fourth image, in the order of names, is of val, and the others
are of train.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from skipless.datasets.labels.masks import (
    VOID,
    SegmentationSet,
    distinct_colors,
    label_table,
    list_folder,
    read_values,
    require_files,
)
from skipless.datasets.storage.names import EXTENSIONS

MOST = 210  # classes, each with a color of its own


def mask_folder(root: str | Path, split: str, void: Sequence[int] = (VOID,)) -> SegmentationSet:
    """A split of the set in `root`, laid out as above; `all` is the whole of a set that is not split into folders.
    It is called like the folder.

    Args:
        void: values of pixels that are ignored; they are no classes.

    Raises FileNotFoundError for a missing folder or mask; ValueError for another split, two images of one name, no
    class or more than 210; UnreadableImage where masks must tell the classes and cannot be read.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; give one that holds images/ and masks/")
    if void and not 0 <= min(void) <= max(void) <= 255:
        raise ValueError(f"void is {list(void)}; give values that masks can hold, from 0 to 255")
    splits = [name for name in dict.fromkeys(("train", "val", split)) if (root / name / "images").is_dir()]
    if splits:
        pairs = {name: _pairs(root / name) for name in splits}
        if split not in pairs:
            raise ValueError(f"{root}: no such split as {split}; it holds {', '.join(splits)}")
    else:
        whole = _pairs(root)
        pairs = {"all": whole, "train": [pair for row, pair in enumerate(whole) if row % 4 < 3], "val": whole[3::4]}
        if split not in pairs:
            raise ValueError(f"{root} has no split {split}; without folders of splits, give train, val or all")
        if not pairs[split]:
            raise ValueError(f"{root / 'images'}: {len(whole)} images are too few; every fourth is of val")
    listed = root / "classes.txt"
    named = _listed(listed) if listed.exists() else _seen([mask for part in pairs.values() for _, mask in part])
    named = {value: name for value, name in named.items() if value not in void}
    if not 0 < len(named) <= MOST:
        raise ValueError(
            f"{listed if listed.exists() else root}: {len(named)} classes without those that are void; there must be 1 "
            f"to {MOST}"
        )
    labels = label_table(0, 0, void)
    labels[list(named)] = np.arange(len(named))
    images, masks = zip(*pairs[split], strict=True)
    convention = "each value needs a line in classes.txt or must be given as void"
    names, classes = tuple(image.stem for image in images), tuple(named.values())
    name, colors = root.resolve().name, distinct_colors(len(named))
    return SegmentationSet(name, split, names, images, masks, classes, colors, labels, convention)


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Every image with its mask, in the order of names."""
    files = [name for name in list_folder(folder / "images") if name.lower().endswith(EXTENSIONS) and name[0] != "."]
    images = sorted((folder / "images" / name for name in files), key=lambda image: image.stem)
    if not images:
        raise FileNotFoundError(f"{folder / 'images'}: no images there; give a folder that holds images/ and masks/")
    for image, after in pairwise(images):
        if image.stem == after.stem:
            raise ValueError(f"{image} and {after.name} are of one name, by which masks are found: rename one")
    pairs = [(image, folder / "masks" / f"{image.stem}.png") for image in images]
    require_files([mask for _, mask in pairs], "mask")
    return pairs


def _listed(path: Path) -> dict[int, str]:
    """The classes that a file names, by their values."""
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as names of classes ({error})") from error
    if len(lines) > 256:
        raise ValueError(f"{path}: has {len(lines)} lines, and masks hold values up to 255; give a name a line")
    return {value: line.strip() for value, line in enumerate(lines) if line.strip()}


def _seen(masks: Sequence[Path]) -> dict[int, str]:
    """The values that masks hold, under names that are the values."""
    values = sorted(set[int]().union(*(np.unique(read_values(mask)).tolist() for mask in dict.fromkeys(masks))))
    return {value: str(value) for value in values}
