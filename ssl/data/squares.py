"""Central squares of images, for what is measured on a few of them."""

from contextlib import suppress
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from skipless.common.pixels import center_crop, normalize
from skipless.datasets.images import UnreadableImage


class Images(Protocol):
    """A set of images that can be read one by one, as uint8 [H, W, 3]."""

    def __len__(self) -> int: ...
    def read(self, index: int, /) -> np.ndarray: ...


def central_squares(images: Images, count: int, size: int) -> Tensor:
    """Central squares of images evenly spread over a source, uint8 [count or fewer, size, size, 3].

    Unreadable images are left out. Raises ValueError where there is no other.
    """
    squares = []
    for row in np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int).tolist():
        with suppress(UnreadableImage):
            squares.append(center_crop(images.read(row), size, size))
    if not squares:
        raise ValueError(f"none of {min(count, len(images))} images, evenly spread over the set, can be read")
    return torch.from_numpy(np.stack(squares))


def normalized_squares(images: Images, count: int, size: int) -> Tensor:
    """`central_squares` as a network of ours takes them, float32 [count or fewer, 3, size, size]."""
    return normalize(central_squares(images, count, size)[None])
