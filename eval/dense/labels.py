"""Labels of patches from those of pixels, and the other way round."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from skipless.common.distributed import rank
from skipless.common.progress import Progress
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.reading import read_batches


def label_shares(mask: np.ndarray, h: int, w: int, classes: int) -> np.ndarray:
    """The share of each class in the patches of an h x w grid laid over a mask.

    Args:
        mask: uint8 [H, W]; values from `classes` on are ignored. A pixel belongs to the patch its center lies in.

    Returns:
        float32 [h, w, classes]; the shares of a patch add up to the share of its pixels that are labeled.
    """
    rows = (2 * np.arange(mask.shape[0]) + 1) * h // (2 * mask.shape[0])
    columns = (2 * np.arange(mask.shape[1]) + 1) * w // (2 * mask.shape[1])
    patch = rows[:, None] * w + columns
    labeled = mask < classes
    counts = np.bincount(patch[labeled] * classes + mask[labeled], minlength=h * w * classes)
    # A mask smaller than the grid leaves some patches without a pixel.
    pixels = np.maximum(np.bincount(patch.ravel(), minlength=h * w), 1)
    return (counts.reshape(h, w, classes) / pixels.reshape(h, w, 1)).astype(np.float32)


def read_label_shares(
    images: SegmentationSet, rows: Sequence[int] | np.ndarray, grid: tuple[int, int], workers: int
) -> Iterator[np.ndarray]:
    """`label_shares` of some images, float32 [h, w, C] each.

    Raises:
        ValueError: an unreadable mask, or one that is not as large as its image.
    """
    batches = [[int(row)] for row in rows]
    progress = Progress(desc="labels of patches", unit="image", total=len(batches), active=rank() == 0)
    with progress:
        for (shares,) in read_batches(partial(_read_shares, images, grid), batches, workers):
            yield shares
            progress.update()


def _read_shares(images: SegmentationSet, grid: tuple[int, int], row: int) -> np.ndarray:
    return label_shares(images.read_matched_mask(row), *grid, len(images.classes))


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], bilinear with half-pixel centers (align_corners=False), as in all protocols."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def predict(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Class of every pixel, int64 of shape `size`, from logits [C, h, w] by `resize_logits`."""
    # Over the first dimension argmax takes six times as long on a CPU.
    return resize_logits(logits[None], size)[0].max(0).indices
