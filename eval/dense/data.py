"""Segmentation data sets as the evaluations open and read them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from skipless.datasets.labels.ade20k import ade20k
from skipless.datasets.labels.cityscapes import cityscapes
from skipless.datasets.labels.coco import coco_stuff
from skipless.datasets.labels.context import pascal_context
from skipless.datasets.labels.counts import describe_split
from skipless.datasets.labels.masks import SegmentationSet
from skipless.datasets.labels.own import mask_folder
from skipless.datasets.labels.voc import scenes_segmentation, voc_segmentation
from skipless.eval.evaluation import Context
from skipless.eval.features import Features, extract

DataName = Literal[
    "voc12", "coco-stuff-27", "coco-stuff-171", "ade20k", "cityscapes", "pascal-context-59", "scenes", "masks"
]

DATA: dict[str, Callable[..., SegmentationSet]] = {
    "voc12": voc_segmentation,
    "coco-stuff-27": partial(coco_stuff, classes=27),
    "coco-stuff-171": partial(coco_stuff, classes=171),
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "pascal-context-59": pascal_context,
    "scenes": scenes_segmentation,
    "masks": mask_folder,
}


@dataclass
class SplitSettings:
    """What is segmented."""

    name: DataName
    """Data set: PASCAL VOC 2012 (21 classes), COCO-Stuff (27 coarse or 171 classes), ADE20K (150), Cityscapes (19),
    Pascal Context (59), the scenes that datasets/scenes.py writes, or masks: your own, in a folder with images/ and
    masks/ (docs/data.md)."""
    root: str
    """Its folder, laid out as its authors ship it: VOCdevkit, COCO's, ADEChallengeData2016, the scenes' or your own."""
    split: str = "val"
    """Split whose mIoU is measured."""
    void: tuple[int, ...] | None = None
    """masks: values of pixels that are neither learned from nor scored, as in 0 255; by default 255."""


@dataclass
class DataSettings(SplitSettings):
    """What is segmented, and what is learned from."""

    train_split: str | None = None
    """Split that is learned from. By default train; where the protocol has it so, on voc12 trainaug."""


def open_split(data: SplitSettings, split: str) -> SegmentationSet:
    """A split of the data set.

    Raises:
        ValueError, FileNotFoundError: it is not there, or not laid out as its authors ship it.
    """
    if data.void is None:
        return DATA[data.name](data.root, split)
    if data.name != "masks":
        raise ValueError(f"data.void is for masks, and data.name is {data.name}; leave it out")
    return mask_folder(data.root, split, data.void)


def described(images: SegmentationSet) -> str:
    """The data set, its split and how much of it is there, in one line."""
    return describe_split(images.name, images.split, len(images))


def square_features(context: Context, images: SegmentationSet, size: int, rows: np.ndarray | None = None) -> Features:
    """Patch features of images resized to squares of `size`, a multiple of the patch; of some of the images, if `rows`
    says which. An image is read together with its mask, which must fit."""
    rows = np.arange(len(images)) if rows is None else rows
    paths = [images.images[row] for row in rows]
    return extract(
        context.backbone, paths, partial(_image_of_row, images, rows), size, context.blocks, context.cache, "tokens",
        context.batch_size, context.workers, f"features, {images.split}",
    )  # fmt: skip


def _image_of_row(images: SegmentationSet, rows: np.ndarray, position: int) -> np.ndarray:
    return images.read(int(rows[position]))[0]
