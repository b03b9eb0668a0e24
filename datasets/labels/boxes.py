"""Images with a box around every object: what a set for object discovery is here, whoever made it.

    trainval = voc_boxes("data/VOCdevkit", "trainval", year=2007)  # of voc.py; coco.py has others
    trainval.read_image(0)  # uint8 [H, W, 3]
    trainval.boxes[0]  # float64 [n, 4]
    easy, boxes, images = trainval.without_hard()

Boxes are x0, y0, x1, y1 in pixels of the image as stored, half-open: the box of the whole image is 0, 0, W, H.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from skipless.datasets.images import open_images, read_image
from skipless.datasets.labels.masks import read_stored, require_files


@dataclass(frozen=True, eq=False)
class BoxSet:
    """N images with their boxes; an image may have none. Regions marked as a crowd are never among the boxes.

    Holds no open file: it can be pickled, forked and used from several threads.
    """

    name: str
    """"voc07", "voc12", "scenes", "coco", "coco20k", "boxes" or "folder"."""
    split: str
    names: tuple[str, ...]
    """[N] image names in the set's order, without extension."""
    images: tuple[Path, ...]
    """[N] image files."""
    ids: tuple[int, ...]
    """[N] image ids as COCO's results name them; outside COCO 0..N-1."""
    boxes: tuple[np.ndarray, ...]
    """N arrays, float64 [n, 4] (x0, y0, x1, y1)."""
    categories: tuple[np.ndarray, ...]
    """N arrays, int64 [n]: COCO's category ids; for VOC and scenes 1, 2, ... in the order of their classes."""
    difficult: tuple[np.ndarray, ...]
    """N arrays, bool [n]; False outside VOC and scenes."""
    truncated: tuple[np.ndarray, ...]
    """N arrays, bool [n]; False outside VOC and scenes."""
    upright: bool = False
    """Whether images are turned by their EXIF orientation: of a folder without boxes, and where annotations say so."""

    def __post_init__(self) -> None:
        """Raises FileNotFoundError where an image is missing, naming the first and how many there are."""
        require_files(self.images, "image")

    def __len__(self) -> int:
        return len(self.names)

    def read_image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB, pixels as stored unless the set is `upright`. Raises UnreadableImage."""
        return read_image(self.images[index]) if self.upright else read_stored(self.images[index])

    def without_hard(self) -> tuple["BoxSet", int, int]:
        """The set without difficult and truncated boxes and then without the images that have no box, and how many
        boxes and images were dropped. Raises ValueError where none is left.

        Images that had no box to begin with go, too, as in LOST's `--no_hard` (arXiv 2109.14279).
        """
        keep = [~(difficult | truncated) for difficult, truncated in zip(self.difficult, self.truncated, strict=True)]
        left = [index for index in range(len(self)) if keep[index].any()]
        if not left:
            raise ValueError(f"{self.name} {self.split}: no box is left without the difficult and truncated ones")
        easy = replace(
            self,
            names=tuple(self.names[index] for index in left),
            images=tuple(self.images[index] for index in left),
            ids=tuple(self.ids[index] for index in left),
            boxes=tuple(self.boxes[index][keep[index]] for index in left),
            categories=tuple(self.categories[index][keep[index]] for index in left),
            difficult=tuple(self.difficult[index][keep[index]] for index in left),
            truncated=tuple(self.truncated[index][keep[index]] for index in left),
        )
        return easy, sum(int((~kept).sum()) for kept in keep), len(self) - len(left)


def folder_boxes(path: str | Path) -> BoxSet:
    """The images of a folder, without any box, turned upright. Names are paths below the folder, without extension.

    Finds images, and raises, as `images.open_images`; ValueError for a zip archive, too.
    """
    source = open_images(path)
    if source.members is not None:
        raise ValueError(f"{path}: is a zip archive; unpack it and give the folder")
    names = [name.rpartition(".")[0] for name in source.names]
    return set_without_boxes("folder", [source.root / name for name in source.names], names, upright=True)


def set_without_boxes(
    name: str, images: Iterable[Path], names: Sequence[str] | None = None, *, upright: bool = False
) -> BoxSet:
    """Images without any box, all of them as one split; called by `names`, or as their files are."""
    images = tuple(images)
    count = len(images)
    return BoxSet(
        name,
        "all",
        tuple(names or (image.stem for image in images)),
        images,
        tuple(range(count)),
        (np.zeros((0, 4)),) * count,
        (np.zeros(0, np.int64),) * count,
        (np.zeros(0, bool),) * count,
        (np.zeros(0, bool),) * count,
        upright=upright,
    )
