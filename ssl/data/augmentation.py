"""Augmentation for classification: random crops, RandAugment, erasing and mixing; central crops for validation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from skipless.common.pixels import MEAN, center_crop, crop_box, normalize, resample
from skipless.datasets.images import UnreadableImage
from skipless.datasets.labels.classes import LabeledSet


@dataclass
class Augmentation:
    """Random crops and flips, RandAugment, erasing, mixing. The defaults are DeiT's (arXiv 2012.12877, table 9)."""

    size: int = 224
    """Side of the training crops and of the validation images in pixels; a multiple of the patch size."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of a crop's area, as a share of the image's. Small models on little data want less: 0.35 to 1."""
    randaugment: float = 9.0
    """Strength of RandAugment on timm's scale from 0 (off) to 10: two operations, each with probability 1/2."""
    erasing: float = 0.25
    """Share of the training images in which a random rectangle becomes noise."""
    mixup: float = 0.8
    """Images and labels are blended with a weight from Beta(mixup, mixup); 0 turns it off. With cutmix too, each batch
    draws which of the two."""
    cutmix: float = 1.0
    """A rectangle comes from another image, of an area from Beta(cutmix, cutmix), and labels are blended by area; 0
    turns it off."""
    label_smoothing: float = 0.1
    """Share of the target that all classes get alike."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"augmentation.size is {self.size}; it must be at least 1 pixel")
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"augmentation.scale is ({low}, {high}); it must be two rising shares of the area in (0, 1]"
            )
        if not 0 <= self.randaugment <= 10:
            raise ValueError(f"augmentation.randaugment is {self.randaugment:g}; it must be in [0, 10]")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"augmentation.erasing is {self.erasing:g}; it must be in [0, 1]")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"augmentation.{name} is {getattr(self, name):g}; it must be positive, or 0 for none")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"augmentation.label_smoothing is {self.label_smoothing:g}; it must be in [0, 1)")


Box = tuple[int, int, int, int]
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class TrainingImages(Dataset[tuple[Tensor, Box, Tensor, int]]):
    """Augmented images and their classes, for keys (epoch, index), as bytes: a quarter of what floats would take.

    An item is an image, uint8 [S, S, 3]; the rectangle to be erased in it, (top, left, height, width), 0 of each for
    none; float32 [3, height, width], the noise that takes its place; and the class. `collate` makes a batch of them,
    and `prepare` the network's input.

    What comes out depends on (seed, epoch, index) alone. Crop and flip are Szegedy et al.'s (arXiv 1409.4842);
    RandAugment (arXiv 1909.13719) and erasing (arXiv 1708.04896) are torchvision's. DeiT used timm's RandAugment,
    "rand-m9-mstd0.5-inc1": that has two more operations (inversion, and adding to dark pixels), posterizes to fewer
    bits, and varies the strength a little.
    """

    def __init__(self, images: LabeledSet, augmentation: Augmentation, seed: int):
        self.images, self.augmentation, self.seed = images, augmentation, seed
        changes: list[Callable[[Tensor], Tensor]] = []
        if augmentation.randaugment:
            one = v2.RandAugment(
                num_ops=1,
                magnitude=round(10 * augmentation.randaugment),
                num_magnitude_bins=101,
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=[round(255 * channel) for channel in MEAN],
            )
            changes += [v2.RandomApply([one], p=0.5)] * 2
        self.change = v2.Compose(changes) if changes else v2.Identity()
        self.erasing = v2.RandomErasing(value="random")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Box, Tensor, int]:
        cv2.setNumThreads(0)  # workers share the cores
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        image = _read(self.images, index)
        top, left, height, width = crop_box(image.shape[0], image.shape[1], self.augmentation.scale, rng)
        view = resample(image[top : top + height, left : left + width], self.augmentation.size, self.augmentation.size)
        if rng.random() < 0.5:
            view = np.ascontiguousarray(view[:, ::-1])
        with torch.random.fork_rng(devices=[]):  # torchvision draws from torch's global generator
            torch.default_generator.manual_seed(int(rng.integers(2**62)))
            changed = self.change(torch.from_numpy(view).permute(2, 0, 1))
            box, noise = (0, 0, 0, 0), torch.empty(3, 0, 0)
            if self.augmentation.erasing and torch.rand(1) < self.augmentation.erasing:
                drawn = self.erasing.make_params([changed])
                if drawn["v"] is not None:
                    box, noise = (drawn["i"], drawn["j"], drawn["h"], drawn["w"]), drawn["v"]
        return changed.permute(1, 2, 0), box, noise, int(self.images.labels[index])


def collate(items: Sequence[tuple[Tensor, Box, Tensor, int]]) -> Batch:
    """A batch of `TrainingImages`: uint8 [B, S, S, 3], rectangles [B, 4], their noise one after the other, classes [B].

    All tensors are on the CPU.
    """
    views, boxes, noise, labels = zip(*items, strict=True)
    return torch.stack(views), torch.tensor(boxes), torch.cat([x.flatten() for x in noise]), torch.tensor(labels)


def prepare(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch on the device: float32 [B, 3, S, S], normalized and erased, and classes int64 [B]. Without a wait."""
    views, noise, labels = (x.to(device, non_blocking=True) for x in (batch[0], batch[2], batch[3]))
    images, boxes = normalize(views[None]), batch[1].tolist()
    pieces = noise.split([3 * height * width for _, _, height, width in boxes])
    for image, (top, left, height, width), piece in zip(images, boxes, pieces, strict=True):
        if height:
            image[:, top : top + height, left : left + width] = piece.view(3, height, width)
    return images, labels


class ValidationImages(Dataset[tuple[Tensor, int]]):
    """Central crops, uint8 [S, S, 3], after a resize of the short side to 8/7 of S (256 for 224), and their classes."""

    def __init__(self, images: LabeledSet, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        view = center_crop(_read(self.images, index), self.size, round(self.size * 8 / 7))
        return torch.from_numpy(view), int(self.images.labels[index])


def _read(images: LabeledSet, index: int) -> np.ndarray:
    try:
        return images.read(index)
    except UnreadableImage as error:
        # A worker's error is raised anew from its text alone, which UnreadableImage cannot be made of.
        raise ValueError(f"{error}; repair or remove it") from None


def mixing(augmentation: Augmentation, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Mixup (arXiv 1710.09412) or cutmix (arXiv 1905.04899), drawn for each batch; None where neither is wanted.

    Returns:
        A function (images [B, 3, S, S], classes int64 [B]) -> (images, distributions over the classes [B, C]).
    """
    choices = []
    if augmentation.mixup:
        choices.append(v2.MixUp(alpha=augmentation.mixup, num_classes=classes))
    if augmentation.cutmix:
        choices.append(v2.CutMix(alpha=augmentation.cutmix, num_classes=classes))
    return v2.RandomChoice(choices) if choices else None
