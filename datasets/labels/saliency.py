"""Images with the mask of what stands out in them: ECSSD, DUTS, DUT-OMRON, or folders of one's own.

ecssd = saliency_masks("data/ECSSD", "ecssd")
ecssd.images.read_image(0)  # uint8 [H, W, 3]
ecssd.read_mask(0)          # bool [H, W]
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from skipless.datasets.images import UnreadableImage
from skipless.datasets.labels.boxes import BoxSet, set_without_boxes
from skipless.datasets.labels.masks import list_folder, read_stored, require_files
from skipless.datasets.storage.names import EXTENSIONS

SaliencyName = Literal["ecssd", "duts-te", "dut-omron", "saliency"]
# Names under which the authors' archives unpack, TokenCut's, those of one's own masks, and VOC's, where 0 is black.
IMAGES = ("images", "img", "DUTS-TE-Image", "DUT-OMRON-image", "JPEGImages")
MASKS = ("ground_truth_mask", "gt", "DUTS-TE-Mask", "pixelwiseGT-new-PNG", "masks", "SegmentationClass")


@dataclass(frozen=True, eq=False)
class SaliencySet:
    """N images and their masks."""

    images: BoxSet
    """Without boxes."""
    masks: tuple[Path, ...]
    """[N] files."""

    def __len__(self) -> int:
        return len(self.masks)

    def spread(self, count: int) -> "SaliencySet":
        """At most `count` of the images, evenly spread."""
        rows = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int).tolist()
        images = set_without_boxes(self.images.name, [self.images.images[row] for row in rows])
        return SaliencySet(images, tuple(self.masks[row] for row in rows))

    def read_mask(self, index: int) -> np.ndarray:
        """bool [H, W]: pixels that are not black. Soft borders of masks belong to the object, as in the evaluation that
        TokenCut (arXiv 2202.11539) released.

        Raises UnreadableImage, also for a mask of another size than its image.
        """
        mask = np.asarray(Image.fromarray(read_stored(self.masks[index])).convert("L")) > 0
        height, width = self.images.read_image(index).shape[:2]
        if mask.shape != (height, width):
            raise UnreadableImage(
                self.masks[index],
                f"the mask has {mask.shape[1]} x {mask.shape[0]} pixels and its image {self.images.images[index]} "
                f"{width} x {height}; both must be the originals",
            )
        return mask


def saliency_masks(root: str | Path, name: SaliencyName) -> SaliencySet:
    """The set in `root`: a folder of images and a folder of masks of the same names, called as in `IMAGES` and `MASKS`.

    Raises FileNotFoundError for a missing folder or mask, ValueError where two masks are of one name.
    """
    root = Path(root).expanduser()
    folders = []
    for names, what in ((IMAGES, "images"), (MASKS, "masks")):
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            raise FileNotFoundError(f"{root}: no folder of {what} there; one of {', '.join(names)} is looked for")
        folders.append(folder)
    pictures, masks = (
        {Path(name).stem: folder / name for name in sorted(list_folder(folder)) if name.lower().endswith(EXTENSIONS)}
        for folder in folders
    )
    if not pictures:
        raise FileNotFoundError(f"{folders[0]}: no images there")
    require_files([masks.get(stem, folders[1] / f"{stem}.png") for stem in pictures], "mask")
    return SaliencySet(set_without_boxes(name, pictures.values()), tuple(masks[stem] for stem in pictures))
