"""Predictions by the heads of a published protocol: sliding windows (mmsegmentation) or whole squares."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skipless.common.distributed import rank, world_size
from skipless.common.progress import Progress
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.backbones import Backbone, pad_to_patch
from skipless.eval.dense.augmentation import Library, resize_image, resize_mask, size_within
from skipless.eval.dense.heads import LinearHeads
from skipless.eval.dense.labels import predict, resize_logits
from skipless.eval.dense.outcome import Outcome, Tally
from skipless.eval.dense.windows import by_shape, cut_windows, mean_of_windows
from skipless.eval.evaluation import Context
from skipless.eval.reading import read_batches


@dataclass
class InferenceSettings:
    """How predictions are made and compared."""

    kind: Literal["windows", "square"] = "windows"
    """windows: sliding window on the image resized to within `scale`; logits resized to the original label. square: the
    image resized to a square; logits and labels compared on a `grid` x `grid` raster."""
    scale: tuple[int, int] = (2048, 512)
    """windows: long and short side that images are resized to fit in."""
    window: int = 512
    """windows: its side in pixels."""
    stride: int = 341
    """windows: pixels from one to the next."""
    size: int = 448
    """square: side of the image in pixels."""
    grid: int = 100
    """square: side of the raster on which logits and labels are compared."""

    def __post_init__(self) -> None:
        if min(self.window, self.size, self.grid, *self.scale) < 1:
            raise ValueError("training.inference: scale, window, size and grid must be 1 or more")
        if not 0 < self.stride <= self.window:
            raise ValueError(
                f"training.inference.stride is {self.stride}; it must be 1 to the window's side, {self.window}"
            )


@torch.inference_mode()
def score_heads(
    context: Context,
    heads: LinearHeads,
    images: SegmentationSet,
    settings: InferenceSettings,
    library: Library,
    shown: Sequence[int] = (),
) -> Outcome:
    """What the heads predict for a data set.

    Of `batch_size` images that are read together, the windows of one size go through the backbone together, at most
    `batch_size` of them. The figures do not depend on it but by rounding.

    Raises:
        ValueError: an unreadable image, or features that are not finite.
    """
    heads.eval()
    tally = Tally(len(heads.choices), len(images), len(images.classes), context.device, shown)
    batches = _batches(len(images), context.batch_size)
    samples = read_batches(partial(_read, images, settings, library), batches, context.workers)
    title = f"{images.name} {images.split}"
    with Progress(total=sum(map(len, batches)), desc=title, unit="image", active=rank() == 0) as progress:
        for batch, pairs in zip(batches, samples, strict=True):
            pictures = [context.backbone.normalize(picture[None])[0] for picture, _ in pairs]
            logits = _patch_logits(heads, context.backbone, pictures, settings, context.batch_size)
            finite = torch.stack([parts.isfinite().all() for parts in logits])
            if not finite.all():
                path = images.images[batch[int(finite.int().argmin())]]
                raise ValueError(f"{path}: {not_finite(context.backbone)}")
            for index, picture, (_, mask), parts in zip(batch, pictures, pairs, logits, strict=True):
                truth = torch.from_numpy(mask).to(context.device, non_blocking=True).long()
                if settings.kind == "square":
                    truth = nearest_labels(truth[None], (settings.grid, settings.grid))[0]
                # Choice by choice, since those of all choices at the size of the image would fill the memory.
                for number, windows in enumerate(parts.unbind(1)):
                    tally.add(number, index, truth, predict(_merged(windows, picture, settings), truth.shape))
                progress.update()
    return tally.outcome()


def _batches(images: int, size: int) -> list[list[int]]:
    """This process's images."""
    mine = list(range(rank(), images, world_size()))
    return [mine[first : first + size] for first in range(0, len(mine), size)]


def _read(
    images: SegmentationSet, settings: InferenceSettings, library: Library, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """An image at the size that inference wants, and the mask that its prediction is compared to."""
    image, mask = images.read(index)
    if settings.kind == "windows":
        height, width = size_within(mask.shape[0], mask.shape[1], *settings.scale)
        return resize_image(image, height, width, library), mask
    side = settings.size
    return resize_image(image, side, side, library), resize_mask(mask, side, side)


def features_of(backbone: Backbone, images: Tensor, choices: Sequence[tuple[int, ...]]) -> dict[int, Tensor]:
    """[B, D, h, w] by block. What the patch does not divide is padded all around, as DINOv2 does."""
    blocks = sorted({block for choice in choices for block in choice})
    features = backbone.features(pad_to_patch(images, backbone.patch, centered=True), blocks)
    return {block: f.patches.permute(0, 3, 1, 2) for block, f in zip(blocks, features, strict=True)}


def _patch_logits(
    heads: LinearHeads, backbone: Backbone, pictures: Sequence[Tensor], inference: InferenceSettings, batch_size: int
) -> list[Tensor]:
    """For each picture [3, H, W] the logits of the patches of its windows, [windows, choices, C, h, w]; a square is one
    window."""
    if inference.kind == "windows":
        windows = [cut_windows(picture, inference.window, inference.stride) for picture in pictures]
    else:
        windows = [[picture] for picture in pictures]

    def network(crops: Tensor) -> Tensor:
        return torch.stack(heads(features_of(backbone, crops, heads.choices)), 1)

    logits = iter(by_shape(network, [window for crops in windows for window in crops], batch_size))
    return [torch.stack([next(logits) for _ in crops]) for crops in windows]


def _merged(parts: Tensor, picture: Tensor, inference: InferenceSettings) -> Tensor:
    """Logits [C, H, W] of a picture [3, H, W] from those of its windows' patches [windows, C, h, w]; of a square's, the
    only ones, as they are."""
    if inference.kind == "square":
        return parts[0]
    height, width = picture.shape[1:]
    parts = resize_logits(parts, (min(height, inference.window), min(width, inference.window)))
    return mean_of_windows(parts, height, width, inference.window, inference.stride)


def nearest_labels(masks: Tensor, size: Sequence[int]) -> Tensor:
    """int64 labels at another size, by nearest neighbor."""
    if tuple(masks.shape[1:]) == tuple(size):
        return masks
    return F.interpolate(masks[:, None].float(), tuple(size), mode="nearest")[:, 0].long()


def not_finite(backbone: Backbone) -> str:
    return f"features of {backbone.path} are NaN or infinite; check the checkpoint, or take other blocks"
