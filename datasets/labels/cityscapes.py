"""Cityscapes with its 19 classes, as leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip unpack.

    leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
    gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png       0 to 33; of these 19 are classes, the others void

Source: Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding" (arXiv 1604.01685), and the
table of labels in its scripts.
"""

from pathlib import Path

import numpy as np

from skipless.datasets.labels.masks import VOID, SegmentationSet, label_table, list_folder

IMAGE, MASK = "_leftImg8bit.png", "_gtFine_labelIds.png"
CLASSES = {
    7: ("road", 0x804080), 8: ("sidewalk", 0xF423E8), 11: ("building", 0x464646), 12: ("wall", 0x66669C),
    13: ("fence", 0xBE9999), 17: ("pole", 0x999999), 19: ("traffic light", 0xFAAA1E),
    20: ("traffic sign", 0xDCDC00), 21: ("vegetation", 0x6B8E23), 22: ("terrain", 0x98FB98), 23: ("sky", 0x4682B4),
    24: ("person", 0xDC143C), 25: ("rider", 0xFF0000), 26: ("car", 0x00008E), 27: ("truck", 0x000046),
    28: ("bus", 0x003C64), 31: ("train", 0x005064), 32: ("motorcycle", 0x0000E6), 33: ("bicycle", 0x770B20),
}  # fmt: skip
"""Name and color of each class, by its value in the files."""


def cityscapes(root: str | Path, split: str) -> SegmentationSet:
    """Split train (2,975) or val (500); the classes that are not evaluated are void.

    Raises FileNotFoundError for a missing folder, image or annotation, ValueError for another split.
    """
    if split not in ("train", "val"):
        raise ValueError(f"Cityscapes has the splits train and val with public annotations, not {split}")
    root = Path(root).expanduser()
    images, masks = root / "leftImg8bit" / split, root / "gtFine" / split
    names = sorted(
        f"{city}/{name.removesuffix(ending)}"
        for folder, ending in ((images, IMAGE), (masks, MASK))
        for city in list_folder(folder)
        for name in list_folder(folder / city)
        if name.endswith(ending)
    )
    names = list(dict.fromkeys(names))  # those that are not in both are found missing
    if not names:
        raise FileNotFoundError(f"{images}: no CITY/NAME{IMAGE} there; give the folder of leftImg8bit and gtFine")
    labels = label_table(0, 0, void=[*range(34), VOID])
    labels[list(CLASSES)] = np.arange(len(CLASSES))
    return SegmentationSet(
        "cityscapes",
        split,
        tuple(name.rpartition("/")[2] for name in names),
        tuple(images / f"{name}{IMAGE}" for name in names),
        tuple(masks / f"{name}{MASK}" for name in names),
        tuple(name for name, _ in CLASSES.values()),
        np.array([[color >> 16, color >> 8 & 255, color & 255] for _, color in CLASSES.values()], np.uint8),
        labels,
        "0 to 33, of which 19 are classes",
    )
