"""PASCAL VOC as its authors ship it, and the synthetic scenes, which have the same layout.

    VOCdevkit/VOC2012/JPEGImages/NAME.jpg
                      SegmentationClass/NAME.png                   0 background, 1..20 classes, 255 void
                      SegmentationClassAug/NAME.png                not by VOC's authors: see `voc_segmentation`
                      Annotations/NAME.xml                         boxes
                      ImageSets/Segmentation/{train,val,trainval}.txt
                      ImageSets/Main/{train,val,trainval}.txt      VOC2007 has test.txt, too

Everywhere `root` may be the year's own folder (VOC2012), the folder that holds it (VOCdevkit), or the one above.

Source: M. Everingham et al., "The PASCAL Visual Object Classes Challenge 2012 (VOC2012)" and 2007, development kits.
"""

from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np

from skipless.datasets.labels.boxes import BoxSet
from skipless.datasets.labels.masks import VOID, SegmentationSet, label_table, list_folder, read_names, require_files

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
"""The 20 object classes; in masks class n of this list, counted from 1, has label n, and background has 0."""


def voc_palette() -> np.ndarray:
    """VOC's color map (devkit, VOClabelcolormap.m), uint8 [256, 3]: the bits of the index dealt out to R, G and B."""
    index = np.arange(256)[:, None]
    channel = np.arange(3)
    return np.asarray(sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)), np.uint8)


def voc_segmentation(root: str | Path, split: str) -> SegmentationSet:
    """VOC 2012 with its 21 classes, background first; value 255 (contours and difficult objects) is void.

    `split` is any list in ImageSets/Segmentation: train (1,464), val (1,449), trainval (2,913). It may also be
    "trainaug" (10,582): train and the images that SBD adds (Hariharan et al., "Semantic contours from inverse
    detectors", ICCV 2011), without val. Its names come from ImageSets/Segmentation/trainaug.txt or, where there is
    none, from train.txt and aug.txt; its masks are VOC's own from SegmentationClass and for other images SBD's from
    SegmentationClassAug. This takes both usual layouts: SegmentationClassAug with the masks of all images, or with
    SBD's alone. SBD's own .mat files are not read.

    Raises FileNotFoundError for a missing folder, list, image or mask, ValueError for a damaged list, for a folder of
    scenes, and where the first masks that are looked at hold no class.
    """
    folder = _find_voc(root, 2012)
    lists = folder / "ImageSets" / "Segmentation"
    augmented = folder / "SegmentationClassAug"
    if split == "trainaug":
        available = list_folder(lists)
        if not augmented.is_dir() or not ("trainaug.txt" in available or {"train.txt", "aug.txt"} <= available):
            raise FileNotFoundError(
                f"{folder}: trainaug needs SBD's masks as PNG in SegmentationClassAug, and the list "
                "ImageSets/Segmentation/trainaug.txt, or train.txt and aug.txt; to learn from VOC's own masks give "
                "--data.train_split train"
            )
        if "trainaug.txt" in available:
            names = read_names(lists / "trainaug.txt")
        else:
            names = tuple(dict.fromkeys(read_names(lists / "train.txt") + read_names(lists / "aug.txt")))
        by_voc = list_folder(folder / "SegmentationClass")
    else:
        names = _names(lists, split)
        by_voc = {f"{name}.png" for name in names}
    masks = tuple(
        (folder / "SegmentationClass" if f"{name}.png" in by_voc else augmented) / f"{name}.png" for name in names
    )
    classes = ("background", *CLASSES)
    labels, colors = label_table(0, len(classes), void=[VOID]), voc_palette()[: len(classes)]
    convention = "0 background, 1 to 20 classes, 255 void"
    found = SegmentationSet("voc12", split, names, _images(folder, names), masks, classes, colors, labels, convention)
    seen = found.values_seen()
    if seen == {0, VOID}:
        raise ValueError(
            f"{masks[0].parent}: the masks hold 0 and 255 alone, so every object is void ({convention}): these are "
            "masks of foreground, not VOC's classes"
        )
    return found


def scenes_segmentation(root: str | Path, split: str) -> SegmentationSet:
    """The scenes that `datasets/scenes.py` wrote to `root`, split train, val or trainval.

    Classes are background and the lines of classes.txt; there is no void. Raises as `voc_segmentation`.
    """
    folder = _find(root, 2012)
    classes = ("background", *_scene_classes(folder))
    names = _names(folder / "ImageSets" / "Segmentation", split)
    masks = tuple(folder / "SegmentationClass" / f"{name}.png" for name in names)
    labels, colors = label_table(0, len(classes)), voc_palette()[: len(classes)]
    return SegmentationSet("scenes", split, names, _images(folder, names), masks, classes, colors, labels)


def voc_boxes(root: str | Path, split: str, year: Literal[2007, 2012]) -> BoxSet:
    """Boxes of VOC 2007 or 2012; `split` is any list in ImageSets/Main (trainval has 5,011 or 11,540 images).

    `difficult` and `truncated` are kept as flags. VOC counts pixels from 1 and its boxes include both ends, so xmin and
    ymin are 1 less here. Categories are 1..20 in the order of `CLASSES`.

    Raises FileNotFoundError for a missing folder, list, image or annotation, ValueError for damaged ones, and for a
    folder of scenes.
    """
    folder = _find_voc(root, year)
    return _boxes(f"voc{year % 100:02}", folder, split, CLASSES)


def scenes_boxes(root: str | Path, split: str) -> BoxSet:
    """Boxes of the scenes that `datasets/scenes.py` wrote to `root`, split train, val or trainval.
    Categories are 1, 2, ... in the order of classes.txt. Raises as `voc_boxes`."""
    folder = _find(root, 2012)
    return _boxes("scenes", folder, split, _scene_classes(folder))


def _boxes(name: str, folder: Path, split: str, classes: tuple[str, ...]) -> BoxSet:
    names = _names(folder / "ImageSets" / "Main", split)
    annotations = [folder / "Annotations" / f"{image}.xml" for image in names]
    require_files(annotations, "annotation")
    boxes, categories, difficult, truncated = zip(
        *(_read_annotation(path, classes) for path in annotations), strict=True
    )
    ids = tuple(range(len(names)))
    return BoxSet(name, split, names, _images(folder, names), ids, boxes, categories, difficult, truncated)


def _read_annotation(path: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes float64 [n, 4], categories int64 [n], difficult bool [n] and truncated bool [n] of an annotation file."""
    boxes, categories, difficult, truncated = [], [], [], []
    try:
        # Direct children only: the parts of a person (head, hand, foot) lie inside its object and have boxes, too.
        for item in ElementTree.parse(path).getroot().findall("object"):
            fields = ("xmin", "ymin", "xmax", "ymax")
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{field}", f"no {field}")) for field in fields)
            name = item.findtext("name", "").strip()
            if name not in classes:
                raise ValueError(f"unknown class '{name}'")
            if not (x0 <= x1 and y0 <= y1):
                raise ValueError(f"the {name} has a box from {x0}, {y0} to {x1}, {y1}")
            boxes.append((x0 - 1, y0 - 1, x1, y1))
            categories.append(1 + classes.index(name))
            difficult.append(item.findtext("difficult", "0").strip() == "1")
            truncated.append(item.findtext("truncated", "0").strip() == "1")
    except (OSError, ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as a VOC annotation ({error})") from error
    return (
        np.array(boxes, np.float64).reshape(-1, 4),
        np.array(categories, np.int64),
        np.array(difficult, bool),
        np.array(truncated, bool),
    )


def _find(root: str | Path, year: int) -> Path:
    """The folder of a year, which holds ImageSets, at or below `root`."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    name = f"VOC{year}"
    if root.resolve().name in ("VOC2007", "VOC2012") and root.resolve().name != name:
        raise ValueError(f"{root}: is {root.resolve().name}, and {name} was asked for")
    for folder in (root, root / name, root / "VOCdevkit" / name):
        if (folder / "ImageSets").is_dir():
            return folder
    raise FileNotFoundError(
        f"{root}: holds no PASCAL VOC {year} (looked for ImageSets, {name}/ImageSets and VOCdevkit/{name}/ImageSets)"
    )


def _find_voc(root: str | Path, year: int) -> Path:
    """As `_find`, but not scenes, whose labels would be taken for VOC's."""
    folder = _find(root, year)
    own = _own_classes(folder)
    if own not in ((), CLASSES):
        raise ValueError(
            f"{folder / 'classes.txt'}: names other classes than VOC's ({own[0]}, ...), so these are synthetic scenes; "
            "read them as the data set 'scenes'"
        )
    return folder


def _names(lists: Path, split: str) -> tuple[str, ...]:
    available = sorted(name.removesuffix(".txt") for name in list_folder(lists) if name.endswith(".txt"))
    if split not in available:
        # Those of one class (cat_train, say) have an underscore.
        known = ", ".join(name for name in available if "_" not in name) or "none"
        raise FileNotFoundError(f"{lists / f'{split}.txt'}: no such split; lists that are there: {known}")
    return read_names(lists / f"{split}.txt")


def _images(folder: Path, names: tuple[str, ...]) -> tuple[Path, ...]:
    return tuple(folder / "JPEGImages" / f"{name}.jpg" for name in names)


def _own_classes(folder: Path) -> tuple[str, ...]:
    """The lines of classes.txt, which scenes have and VOC has not; () without it."""
    path = folder / "classes.txt"
    return read_names(path) if path.exists() else ()


def _scene_classes(folder: Path) -> tuple[str, ...]:
    classes = _own_classes(folder)
    if not classes:
        raise FileNotFoundError(f"{folder / 'classes.txt'}: not found: give the folder that datasets/scenes.py wrote")
    return classes
