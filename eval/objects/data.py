"""Data sets of object discovery: images with boxes, opened by name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from skipless.datasets.labels.boxes import BoxSet, folder_boxes
from skipless.datasets.labels.coco import coco20k, coco_boxes
from skipless.datasets.labels.voc import scenes_boxes, voc_boxes

DataName = Literal["voc07", "voc12", "coco20k", "coco", "scenes", "boxes", "folder"]


@dataclass
class DataSettings:
    """Where objects are looked for."""

    name: DataName
    """Data set. coco is any instances file of COCO; boxes is a file of your own in COCO's format, with images anywhere;
    folder is any folder of images, without a score."""
    root: str
    """Its folder, laid out as its authors ship it: VOCdevkit, COCO's, the scenes' or the images' folder."""
    split: str | None = None
    """Split: for VOC and scenes a list in ImageSets/Main, by default trainval (scenes: val); for coco the part of
    annotations/instances_SPLIT.json, by default val2017."""
    names: str | None = None
    """coco20k: file with the names of its 19,817 images (datasets/coco_20k_filenames.txt in the release of LOST); by
    default coco_20k_filenames.txt in root."""
    annotations: str | None = None
    """boxes: file of images and boxes in COCO's format; each file_name in it is a path below root."""


def open_data(data: DataSettings) -> tuple[BoxSet, Path | None]:
    """Images with their boxes, and the annotation file where it has COCO's format."""
    if data.name != "coco20k" and data.names:
        raise ValueError(f"data.names is for coco20k, and data.name is {data.name}; leave it out")
    if (data.name == "boxes") != bool(data.annotations):
        raise ValueError(f"data.annotations and the data.name boxes belong together, and data.name is {data.name}")
    if data.name in ("coco20k", "boxes", "folder") and data.split:
        raise ValueError(f"data.split has no effect on {data.name}; leave it out")
    if data.name == "scenes":
        return scenes_boxes(data.root, data.split or "val"), None
    if data.name in ("voc07", "voc12"):
        return voc_boxes(data.root, data.split or "trainval", 2007 if data.name == "voc07" else 2012), None
    if data.name == "folder":
        return folder_boxes(data.root), None
    if data.annotations:
        annotations = Path(data.annotations).expanduser()
        return coco_boxes(annotations, data.root, "boxes"), annotations
    root = Path(data.root).expanduser()
    if data.name == "coco20k":
        listed = Path(data.names or root / "coco_20k_filenames.txt")
        if not data.names and not listed.exists():
            raise ValueError("coco20k needs data.names, the list of its images (in the release of LOST)")
        return coco20k(root, listed), root / "annotations" / "instances_train2014.json"
    split = data.split or "val2017"
    annotations = root / "annotations" / f"instances_{split}.json"
    if not annotations.exists():
        there = sorted(path.stem.removeprefix("instances_") for path in root.glob("annotations/instances_*.json"))
        raise FileNotFoundError(f"{annotations}: no such file; splits that are there: {', '.join(there) or 'none'}")
    folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), root / split)
    return coco_boxes(annotations, folder), annotations
