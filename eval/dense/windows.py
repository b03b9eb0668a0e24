"""Inference with a sliding window, as mmsegmentation does it."""

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Window = tuple[int, int, int, int]  # top, left, bottom, right; half-open


def windows(height: int, width: int, size: int, stride: int) -> list[Window]:
    """Windows of `size` that cover an image, row by row, `stride` apart; the last ones are moved back inside.

    All windows of an image have one size: `size`, or the image's own side where that is smaller.

    Examples:
        >>> windows(512, 700, 512, 341)
        [(0, 0, 512, 512), (0, 188, 512, 700)]
    """

    def starts(length: int) -> list[int]:
        count = max(length - size + stride - 1, 0) // stride + 1
        return [max(min(i * stride + size, length) - size, 0) for i in range(count)]

    return [
        (top, left, min(top + size, height), min(left + size, width))
        for top in starts(height)
        for left in starts(width)
    ]


def cut_windows(image: Tensor, size: int, stride: int) -> list[Tensor]:
    """The `windows` of an image [..., H, W], as views."""
    boxes = windows(image.shape[-2], image.shape[-1], size, stride)
    return [image[..., top:bottom, left:right] for top, left, bottom, right in boxes]


def mean_of_windows(parts: Tensor, height: int, width: int, size: int, stride: int) -> Tensor:
    """Logits of every pixel: the mean over the windows that cover it.

    Args:
        parts: logits of the image's windows, in the order of `windows`, [n, ..., h, w].
        height, width: of the image in pixels.

    Returns:
        [..., H, W].
    """
    total = parts.new_zeros(*parts.shape[1:-2], height, width)
    count = parts.new_zeros(height, width)
    for (top, left, bottom, right), logits in zip(windows(height, width, size, stride), parts, strict=True):
        total[..., top:bottom, left:right] += logits
        count[top:bottom, left:right] += 1
    return total / count


def by_shape(network: Callable[[Tensor], Tensor], images: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """What `network` makes of each image, those of one shape in one batch, at most `batch_size` of them.

    Args:
        network: [B, 3, H, W] to [B, ...].
        images: [3, H, W], of any sizes.
    """
    rows_of_shape = defaultdict(list)
    for row, image in enumerate(images):
        rows_of_shape[image.shape].append(row)
    outputs: dict[int, Tensor] = {}
    for rows in rows_of_shape.values():
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            outputs.update(zip(batch, network(torch.stack([images[row] for row in batch])), strict=True))
    return [outputs[row] for row in range(len(images))]
