"""Images and masks cut, resized and distorted together, as the protocols of linear segmentation want them.

`scale_and_crop` is mmsegmentation's, which DINOv2 and DINOv3 train heads with; `resized_crop` is torchvision's, which
Leopart and NeCo use. Masks are resized by nearest neighbor, images bilinearly: by OpenCV, which does not antialias
(mmsegmentation), or by Pillow, which does (the others).
"""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from skipless.common.pixels import crop_box
from skipless.datasets.labels.masks import VOID

Library = Literal["opencv", "pillow"]
CROP_TRIES = 10  # of mmsegmentation's RandomCrop


@dataclass
class AugmentationSettings:
    """How training images are cut and changed."""

    kind: Literal["scale_crop", "resized_crop"] = "scale_crop"
    """scale_crop: mmsegmentation's resize by a random factor, crop and pad. resized_crop: torchvision's."""
    size: int = 512
    """Side of the crop in pixels."""
    flip: float = 0.5
    """Share of the crops that are mirrored."""
    scale: tuple[int, int] = (2048, 512)
    """scale_crop: images are resized to within this long and short side, times a random factor."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """scale_crop: range of the factor."""
    max_class_share: float = 0.75
    """scale_crop: crops in which one class has this share of the labeled pixels or more are drawn again, up to ten
    times; 1 takes any crop."""
    photometric: bool = True
    """scale_crop: mmsegmentation's photometric distortion."""
    area: tuple[float, float] = (0.8, 1.0)
    """resized_crop: range of the crop's area, as a share of the image's."""

    def __post_init__(self) -> None:
        if min(self.size, *self.scale) < 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("training.augmentation: size, scale and ratio must be positive, and ratio must rise")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"training.augmentation.area is {self.area}; it must be two rising shares in (0, 1]")


def augment(
    image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, settings: AugmentationSettings, library: Library
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A training crop as the settings say: uint8 [S, S, 3], uint8 [S, S] with VOID where there is no image, and bool
    [S, S], where there is."""
    if settings.kind == "scale_crop":
        return scale_and_crop(
            image, mask, rng, settings.scale, settings.ratio, settings.size, settings.max_class_share, settings.flip,
            settings.photometric, library,
        )  # fmt: skip
    image, mask = resized_crop(image, mask, rng, settings.size, settings.area, settings.flip, library)
    return image, mask, np.ones(mask.shape, bool)


def resize_image(image: np.ndarray, height: int, width: int, library: Library) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3], bilinear."""
    if library == "opencv":
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, height: int, width: int, library: Library = "pillow") -> np.ndarray:
    """uint8 [H, W] -> uint8 [height, width], nearest neighbor: by Pillow the label at the center of each new pixel, by
    OpenCV, as mmcv does it, that at its upper left corner."""
    if library == "opencv":
        return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))


def size_within(height: int, width: int, long: int, short: int) -> tuple[int, int]:
    """The largest size of these proportions with a long side of at most `long` and a short one of at most `short`."""
    factor = min(long / max(height, width), short / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def scale_and_crop(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    scale: tuple[int, int] = (2048, 512),
    ratio: tuple[float, float] = (0.5, 2.0),
    crop: int = 512,
    max_class_share: float = 0.75,
    flip: float = 0.5,
    photometric: bool = True,
    library: Library = "opencv",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mmsegmentation's training augmentation.

    Resize to within `scale` (long, short side) times a factor drawn from `ratio`; crop, up to ten times anew while one
    class holds `max_class_share` of the labeled pixels or more; flip; distort colors; pad.

    Returns:
        uint8 [crop, crop, 3], uint8 [crop, crop] with VOID where there is no image, and bool [crop, crop], where there
        is: padding is zero after normalization, not black.
    """
    factor = rng.uniform(*ratio)
    height, width = size_within(mask.shape[0], mask.shape[1], int(scale[0] * factor), int(scale[1] * factor))
    image, mask = resize_image(image, height, width, library), resize_mask(mask, height, width, library)
    top, left = _random_corner(height, width, crop, rng)
    for _ in range(CROP_TRIES):
        counts = np.bincount(mask[top : top + crop, left : left + crop].ravel(), minlength=256)[:VOID]
        if max_class_share >= 1 or counts.max() < max_class_share * counts.sum():
            break
        top, left = _random_corner(height, width, crop, rng)
    image, mask = image[top : top + crop, left : left + crop], mask[top : top + crop, left : left + crop]
    if rng.random() < flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    if photometric:
        image = photometric_distortion(np.ascontiguousarray(image), rng)
    below, right = crop - mask.shape[0], crop - mask.shape[1]
    inside = np.pad(np.ones(mask.shape, bool), ((0, below), (0, right)))
    image = np.pad(image, ((0, below), (0, right), (0, 0)))
    return image, np.pad(mask, ((0, below), (0, right)), constant_values=VOID), inside


def resized_crop(
    image: np.ndarray,
    mask: np.ndarray,
    rng: np.random.Generator,
    size: int = 448,
    area: tuple[float, float] = (0.8, 1.0),
    flip: float = 0.5,
    library: Library = "pillow",
) -> tuple[np.ndarray, np.ndarray]:
    """torchvision's RandomResizedCrop, ratio 3/4 to 4/3, of image and mask, and a flip.

    Returns:
        uint8 [size, size, 3] and uint8 [size, size].
    """
    top, left, height, width = crop_box(mask.shape[0], mask.shape[1], area, rng)
    image, mask = image[top : top + height, left : left + width], mask[top : top + height, left : left + width]
    image, mask = resize_image(image, size, size, library), resize_mask(mask, size, size, library)
    if rng.random() < flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return image, mask


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """mmsegmentation's PhotoMetricDistortion on uint8 [H, W, 3] RGB; each change is made with probability 1/2.

    Brightness by up to 32 levels; contrast by a factor from 0.5 to 1.5, here or at the end; saturation by such a
    factor; hue by up to 18 of 180 units.
    """
    if rng.random() < 0.5:
        image = _linear(image, 1.0, rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    if contrast_first and rng.random() < 0.5:
        image = _linear(image, rng.uniform(0.5, 1.5), 0.0)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = _linear(hsv[..., 1], rng.uniform(0.5, 1.5), 0.0)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if rng.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int64) + rng.integers(-18, 18)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not contrast_first and rng.random() < 0.5:
        image = _linear(image, rng.uniform(0.5, 1.5), 0.0)
    return image


def _linear(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    return (image.astype(np.float32) * factor + shift).clip(0, 255).astype(np.uint8)


def _random_corner(height: int, width: int, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(max(height - crop, 0) + 1)), int(rng.integers(max(width - crop, 0) + 1))
