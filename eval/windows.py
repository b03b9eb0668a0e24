"""Inference with a sliding window, as mmsegmentation does it."""

from collections.abc import Callable

import torch
from torch import Tensor

Window = tuple[int, int, int, int]  # top, left, bottom, right; half-open


def windows(height: int, width: int, size: int, stride: int) -> list[Window]:
    """Windows of `size` that cover an image, row by row, `stride` apart; the last ones are moved back inside.

    All windows of an image have one size: `size`, or the image's own side where that is smaller.

    Example:
        >>> windows(512, 700, 512, 341)
        [(0, 0, 512, 512), (0, 188, 512, 700)]
    """
    if not 0 < stride <= size:
        raise ValueError(f"stride is {stride} and window {size}; the stride must be 1 to the window's size")

    def starts(length: int) -> list[int]:
        count = max(length - size + stride - 1, 0) // stride + 1
        return [max(min(i * stride + size, length) - size, 0) for i in range(count)]

    return [
        (top, left, min(top + size, height), min(left + size, width))
        for top in starts(height)
        for left in starts(width)
    ]


def sliding_logits(predict: Callable[[Tensor], Tensor], image: Tensor, size: int, stride: int) -> Tensor:
    """Logits of every pixel: the mean over the windows that cover it.

    Args:
        predict: normalised windows [n, 3, h, w] to logits [n, C, h, w] (C of any number of axes: [n, ..., h, w]).
        image: normalised [3, H, W].
        size, stride: of the window, in pixels.

    Returns:
        [..., H, W], as `predict` without its first axis.
    """
    boxes = windows(image.shape[1], image.shape[2], size, stride)
    parts = predict(torch.stack([image[:, top:bottom, left:right] for top, left, bottom, right in boxes]))
    total = parts.new_zeros(*parts.shape[1:-2], *image.shape[1:])
    count = parts.new_zeros(image.shape[1:])
    for (top, left, bottom, right), logits in zip(boxes, parts, strict=True):
        total[..., top:bottom, left:right] += logits
        count[top:bottom, left:right] += 1
    return total / count
