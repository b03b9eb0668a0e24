"""Synthetic scenes with exact masks, boxes and classes: the offline default data set.

    python datasets/scenes.py --out data/scenes
    python datasets/scenes.py --out data/small --train 500 --val 100 --size 64

A scene shows one large object and up to three smaller ones, which may hide parts of each other, in front of a cluttered
background. A class is a shape together with a family of textures and a range of their periods (`CLASSES`). As in the
world, things of a class tend to have a color, but the hues of classes overlap: color is a hint, and texture or
outline tell the class. Position, proportions, turn (upright, give or take 17 degrees), texture phase, contrast and
illumination are drawn alike for every class.

What `write_scenes` leaves under its root:

    VOCdevkit/VOC2012/JPEGImages/NAME.jpg            RGB, size x size
                      SegmentationClass/NAME.png     palette PNG: 0 background, n = the n-th line of classes.txt
                      SegmentationObject/NAME.png    palette PNG: 0 background, n = the n-th object of the XML
                      Annotations/NAME.xml           boxes, 1-based and inclusive, of the visible part of each object
                      ImageSets/{Main,Segmentation}/{train,val,trainval}.txt
                      classes.txt                    one class name a line, in label order, without background
    train/CLASS/NAME.jpg, val/CLASS/NAME.jpg         the same images by the class of their largest visible object
    scenes.json                                      the settings that made them

There are no void pixels. The class folders hold relative symlinks (copies where the file system has no symlinks): give
`ROOT/train` to pretraining and `ROOT/VOCdevkit` to whatever reads PASCAL VOC.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skipless.common import cli
from skipless.datasets.synthetic.dataset import write_scenes


@dataclass
class Settings:
    """Synthetic scenes with exact masks, boxes and classes, in PASCAL VOC's layout."""

    out: Path = Path("data/scenes")
    """Folder to make. It appears whole or not at all; one that already holds these scenes is left as it is."""
    train: int = 3000
    """Number of training scenes."""
    val: int = 600
    """Number of validation scenes."""
    size: int = 128
    """Side of the images in pixels, at least 32."""
    seed: int = 0
    """Everything random follows from it: the same seed, the same files."""
    workers: int | None = None
    """Number of processes; by default one for each available core. Does not change the files."""


def scenes(settings: Settings) -> None:
    """Write scenes, and say which command reads them."""
    write_scenes(settings.out, settings.train, settings.val, settings.size, settings.seed, settings.workers)
    train = settings.out / "train"
    print(f"next: python ssl/pretrain.py --config configs/demo.yaml --data.path {train} --out runs/scenes")


main = partial(cli.run, scenes, Settings, __doc__)

if __name__ == "__main__":
    main()
