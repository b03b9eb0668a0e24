"""Block-wise masks of the global crops (arXiv 2106.08254, algorithm 1, as in DINOv2), and what the losses need of them.

Half of the global crops, say, get a mask, of a share of their patches that is drawn evenly from a range. It is made of
rectangles: an area from 4 patches to half of the grid, and no more than is missing; a ratio of the sides between 0.3
and 1 / 0.3, its logarithm drawn evenly; any place. So the masks of a grid of 14 x 14 patches have some holes and ends.

DINOv2 spreads the shares evenly over each batch; here every crop draws its own, so that a mask depends on (seed, epoch,
index) alone.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

MIN_PATCHES, ASPECT, TRIES = 4, 0.3, 10


class Masks(NamedTuple):
    """Masks of the N global crops of a micro-batch, of n patches each; all None where nothing is masked."""

    patches: Tensor | None = None
    """bool [N, n]: those that are hidden."""
    read: Tensor | None = None
    """int64 [M]: which of all N * n patches are hidden, rising."""
    weights: Tensor | None = None
    """float32 [M]: 1 / (N * patches hidden in the crop), so that a crop counts the same whatever its mask's size."""

    def to(self, device: torch.device) -> "Masks":
        """The same on a device, without waiting for it."""
        return Masks(*(None if t is None else t.to(device, non_blocking=True) for t in self))


def draw_mask(height: int, width: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """bool [height, width] with at most `count` patches masked, and mostly about as many."""
    mask = np.zeros((height, width), bool)
    left, largest = count, height * width // 2
    while left > 0:
        for _ in range(TRIES):
            most = min(left, largest)
            area = rng.uniform(min(MIN_PATCHES, most), most)
            ratio = math.exp(rng.uniform(math.log(ASPECT), -math.log(ASPECT)))
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if not (0 < rows < height and 0 < columns < width):
                continue
            top, start = rng.integers(0, height - rows, endpoint=True), rng.integers(0, width - columns, endpoint=True)
            block = mask[top : top + rows, start : start + columns]
            new = rows * columns - int(block.sum())
            if 0 < new <= most:
                block[:] = True
                left -= new
                break
        else:
            return mask
    return mask


def draw_masks(side: int, probability: float, shares: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Masks of the two global crops of an image: bool [2, side * side].

    Args:
        side: of the grid of patches; probability: that a crop is masked; shares: range of the share that is masked.
    """
    masks = np.zeros((2, side, side), bool)
    for crop in range(2):
        if rng.random() < probability:
            masks[crop] = draw_mask(side, side, int(side * side * rng.uniform(*shares)), rng)
    return masks.reshape(2, -1)


class MaskedDataset(Dataset[tuple[Any, np.ndarray]]):
    """The samples of another data set, each with the masks of its crops.

    Args:
        dataset: of keys (epoch, index).
        draw: masks [2, n] from (epoch, random numbers of their own).
    """

    def __init__(self, dataset: Dataset[Any], draw: Callable[[int, np.random.Generator], np.ndarray], seed: int):
        self.dataset, self.draw, self.seed = dataset, draw, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, np.ndarray]:
        # The crops draw from (seed, epoch, index).
        return self.dataset[key], self.draw(key[0], np.random.default_rng((self.seed, *key, 1)))

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def collate_masks(masks: Sequence[np.ndarray]) -> Masks:
    """Masks [2, n] of B images -> those of their 2 * B global crops, view by view."""
    hidden = torch.from_numpy(np.stack(masks, axis=1)).flatten(0, 1)
    weights = 1 / (len(hidden) * hidden.sum(1, keepdim=True).clamp(min=1).float())
    read = hidden.flatten().nonzero()[:, 0]
    return Masks(hidden, read, weights.expand_as(hidden)[hidden])


def masked(
    dataset: Dataset[Any], collate: Callable[..., dict[str, Any]], draw: Callable[..., np.ndarray], seed: int
) -> tuple[Dataset[Any], Callable[..., dict[str, Any]]]:
    """A data set and what puts its samples together, with `masks` in the batch."""
    return MaskedDataset(dataset, draw, seed), partial(_collate, collate)


def _collate(collate: Callable[..., dict[str, Any]], samples: Sequence[tuple[Any, np.ndarray]]) -> dict[str, Any]:
    return collate([sample for sample, _ in samples]) | {"masks": collate_masks([masks for _, masks in samples])}
