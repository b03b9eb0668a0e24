"""Pixels of images: resized, cropped, normalized."""

import math

import numpy as np
import torch
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)  # width to height of a crop
LOG_RATIO = (math.log(RATIO[0]), math.log(RATIO[1]))


def uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """What rng.uniform gives, several times faster."""
    return low + (high - low) * rng.random()


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, by the law of torchvision's RandomResizedCrop (Szegedy et al.,
    arXiv 1409.4842, section 6): area uniform in `scale`, logarithm of the ratio uniform, ten tries, then the largest
    central crop of a ratio within bounds."""
    for _ in range(10):
        area = height * width * uniform(rng, *scale)
        ratio = math.exp(uniform(rng, *LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] by bicubic interpolation, antialiased when it shrinks: Pillow's, within 2 gray levels."""
    if image.shape[:2] == (height, width):
        return np.array(image)
    # With the batch dimension in front, torch sees pixels whose channels come last, and neither copies nor transposes:
    # half the time. A part of an image is resized where it lies.
    source = image if image.flags.writeable else np.array(image)
    pixels = torch.from_numpy(source)[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, (height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def center_crop(image: np.ndarray, size: int, resize: int) -> np.ndarray:
    """The usual transform of evaluation: short side resized to `resize` pixels (bicubic), central square of `size`.

    uint8 [H, W, 3] -> uint8 [size, size, 3], as torchvision's Resize and CenterCrop on a Pillow image.
    Raises ValueError where `size` exceeds `resize`.
    """
    if not 1 <= size <= resize:
        raise ValueError(f"cannot cut {size} pixels out of a short side of {resize}: `resize` must be at least `size`")
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = int(resize * height / short), int(resize * width / short)
    resized = resample(image, height, width)
    top, left = round((height - size) / 2), round((width - size) / 2)
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


def normalize(views: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [V, B, H, W, 3] -> `dtype` [V*B, 3, H, W], view by view, with ImageNet's mean and standard deviation.

    Channels come last in memory, as they do in `views`. Runs where `views` are, without a transfer or a wait; the
    arithmetic is float32 or wider whatever `dtype` is.
    """
    rows, width = views.flatten(0, 1).flatten(2), views.shape[3]  # [V * B, H, W * 3]
    wide = torch.promote_types(dtype, torch.float32)
    # Constants for a whole row of pixels: a dimension of three would be walked one value at a time. Filled with Python
    # numbers, since a tensor of them would have to be copied to the device.
    scale, shift = torch.empty(2, width, 3, dtype=wide, device=views.device)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        scale[:, channel], shift[:, channel] = 1 / (255 * std), -mean / std
    pixels = torch.empty(rows.shape, dtype=wide, device=views.device)
    # On a CPU in pieces that stay in its cache, twice as fast.
    piece = len(rows) if views.is_cuda else max(1, 2**17 // max(1, rows[:1].numel()))
    for source, target in zip(rows.split(piece), pixels.split(piece), strict=True):
        torch.addcmul(shift.flatten(), source.to(wide), scale.flatten(), out=target)
    return pixels.unflatten(2, (width, 3)).permute(0, 3, 1, 2).to(dtype)
