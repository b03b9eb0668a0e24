"""Pascal Context with its 59 most frequent classes, on the images of VOC 2010.

    VOC2010/JPEGImages/NAME.jpg
            SegmentationClassContext/NAME.png              0 other, 1..59 classes in the order of their names
            ImageSets/SegmentationContext/{train,val}.txt

This is the layout of mmsegmentation; `datasets/prepare.py` makes it from the authors' files of 459 labels.

Source: Mottaghi et al., "The Role of Context for Object Detection and Semantic Segmentation in the Wild", CVPR 2014.
"""

from pathlib import Path

import numpy as np

from skipless.datasets.labels.masks import SegmentationSet, distinct_colors, label_table, read_names

CLASSES = {
    2: "aeroplane", 9: "bag", 18: "bed", 19: "bedclothes", 22: "bench", 23: "bicycle", 25: "bird", 31: "boat",
    33: "book", 34: "bottle", 44: "building", 45: "bus", 46: "cabinet", 59: "car", 65: "cat", 68: "ceiling",
    72: "chair", 80: "cloth", 85: "computer", 98: "cow", 104: "cup", 105: "curtain", 113: "dog", 115: "door",
    144: "fence", 158: "floor", 159: "flower", 162: "food", 187: "grass", 189: "ground", 207: "horse",
    220: "keyboard", 232: "light", 258: "motorbike", 259: "mountain", 260: "mouse", 284: "person", 295: "plate",
    296: "platform", 308: "pottedplant", 324: "road", 326: "rock", 347: "sheep", 349: "shelves", 354: "sidewalk",
    355: "sign", 360: "sky", 366: "snow", 368: "sofa", 397: "table", 415: "track", 416: "train", 420: "tree",
    424: "truck", 427: "tvmonitor", 440: "wall", 445: "water", 454: "window", 458: "wood",
}  # fmt: skip
"""The 59 classes, by their label among the authors' 459."""


def pascal_context(root: str | Path, split: str) -> SegmentationSet:
    """Split train (4,998) or val (5,105): VOC 2010's, as far as the authors labeled it (mmsegmentation's lists have
    three images fewer). `root` is VOCdevkit or VOC2010. Value 0 is none of the classes, and void.

    Raises FileNotFoundError for a missing folder, list, image or mask, ValueError for a damaged list.
    """
    root = Path(root).expanduser()
    folder = root / "VOC2010" if (root / "VOC2010").is_dir() else root
    names = read_names(folder / "ImageSets/SegmentationContext" / f"{split}.txt")
    return SegmentationSet(
        "pascal-context-59",
        split,
        names,
        tuple(folder / "JPEGImages" / f"{name}.jpg" for name in names),
        tuple(folder / "SegmentationClassContext" / f"{name}.png" for name in names),
        tuple(CLASSES.values()),
        distinct_colors(len(CLASSES)),
        label_table(1, len(CLASSES), void=[0]),
        "0 other, 1 to 59 classes",
    )


def fewer_labels(labels: np.ndarray) -> np.ndarray:
    """The authors' 459 labels as values 0..59, uint8 of the same shape."""
    table = np.zeros(max(460, int(labels.max(initial=0)) + 1), np.uint8)
    table[list(CLASSES)] = np.arange(1, len(CLASSES) + 1)
    return table[labels]
