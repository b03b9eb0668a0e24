"""How much of a data set is there: complete items by split, as images with their masks.

A counter takes the place of a part and the root of all data sets.
"""

from collections.abc import Callable
from pathlib import Path

from skipless.datasets.images import open_images
from skipless.datasets.labels.depth import split_rows
from skipless.datasets.labels.masks import list_folder, read_names
from skipless.datasets.public.archives import COCO20K_NAMES


def voc(**splits: str) -> Callable[[Path, Path], dict[str, int]]:
    """Counts the names in ImageSets/FOLDER/SPLIT.txt whose image is there, and annotation or mask."""

    def counted(place: Path, root: Path) -> dict[str, int]:
        images = list_folder(place / "JPEGImages")
        labels = {
            "Main": {name.replace(".xml", ".jpg") for name in list_folder(place / "Annotations")},
            "Segmentation": {name.replace(".png", ".jpg") for name in list_folder(place / "SegmentationClass")},
        }
        return {
            split: _listed(place / "ImageSets" / lists / f"{split}.txt", images & labels[lists])
            for split, lists in splits.items()
        }

    return counted


def _listed(path: Path, images: set[str]) -> int:
    """How many of the names in a list, with or without folder and .jpg, are among images, which have .jpg."""
    names = read_names(path) if path.is_file() else ()
    return sum(f"{name.rpartition('/')[2].removesuffix('.jpg')}.jpg" in images for name in names)


def names(split: str) -> Callable[[Path, Path], dict[str, int]]:
    return lambda place, root: {split: len(read_names(place))}


def images(split: str, extension: str = ".jpg") -> Callable[[Path, Path], dict[str, int]]:
    return lambda place, root: {split: sum(name.endswith(extension) for name in list_folder(place))}


def file(place: Path, root: Path) -> dict[str, int]:
    return {"annotations": int(place.is_file())}


def coco20k(place: Path, root: Path) -> dict[str, int]:
    names = root / "coco" / COCO20K_NAMES.name
    return {"train2014": _listed(names, list_folder(place))} if names.exists() else images("train2014")(place, root)


def stuff(place: Path, root: Path) -> dict[str, int]:
    maps = {split: list_folder(place / f"{split}2017") for split in ("train", "val")}
    return {split: sum(name.endswith(".png") for name in names) for split, names in maps.items()}


def ade20k(place: Path, root: Path) -> dict[str, int]:
    counts = {}
    for split, folder in (("train", "training"), ("val", "validation")):
        images, masks = (list_folder(place / kind / folder) for kind in ("images", "annotations"))
        counts[split] = sum(name.endswith(".jpg") and name.replace(".jpg", ".png") in masks for name in images)
    return counts


def lists(*splits: str) -> Callable[[Path, Path], dict[str, int]]:
    """Names in PLACE/SPLIT.txt."""
    return lambda place, root: {
        split: len(read_names(place / f"{split}.txt")) if (place / f"{split}.txt").is_file() else 0 for split in splits
    }


def pairs(place: Path, root: Path) -> dict[str, int]:
    return {"test": sum(name.endswith(".json") for name in list_folder(place / "PairAnnotation" / "test"))}


def cities(ending: str) -> Callable[[Path, Path], dict[str, int]]:
    """Files of that ending in SPLIT/CITY."""

    def counted(place: Path, root: Path) -> dict[str, int]:
        files = {s: [list_folder(place / s / city) for city in list_folder(place / s)] for s in ("train", "val")}
        return {split: sum(name.endswith(ending) for city in parts for name in city) for split, parts in files.items()}

    return counted


def davis(place: Path, root: Path) -> dict[str, int]:
    """Listed videos that have as many frames as masks."""
    counts = {}
    for split in ("train", "val"):
        listed = place / "ImageSets" / "2017" / f"{split}.txt"
        folders = [
            [len(list_folder(place / kind / "480p" / name)) for kind in ("JPEGImages", "Annotations")]
            for name in (read_names(listed) if listed.is_file() else ())
        ]
        counts[split] = sum(frames == masks > 0 for frames, masks in folders)
    return counts


def nyuv2(place: Path, root: Path) -> dict[str, int]:
    there = {"nyu_depth_v2_labeled.mat", "splits.mat"} <= list_folder(place)
    return {split: len(split_rows(place / "splits.mat", split)) if there else 0 for split in ("train", "test")}


def salient(images: str, masks: str) -> Callable[[Path, Path], dict[str, int]]:
    """Images with a mask of the same name, in two folders."""

    def counted(place: Path, root: Path) -> dict[str, int]:
        names = [{Path(name).stem for name in list_folder(place / folder)} for folder in (images, masks)]
        return {"all": len(names[0] & names[1])}

    return counted


def classes(*splits: str) -> Callable[[Path, Path], dict[str, int]]:
    """Images in class folders below each split; with one split, below the place itself."""

    def counted(place: Path, root: Path) -> dict[str, int]:
        return {split: _labeled(place / split if len(splits) > 1 else place) for split in splits}

    return counted


def _labeled(folder: Path) -> int:
    try:
        images = open_images(folder)
    except (FileNotFoundError, ValueError):
        return 0
    return len(images) if images.labels is not None else 0
