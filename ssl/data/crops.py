"""DINO's multi-crop augmentation on uint8 images (Caron et al., arXiv 2104.14294, appendix, and arXiv 2006.09882).

    views = multicrop(image, Crops(), np.random.default_rng(0))  # 2 global and 8 local crops, uint8 [S, S, 3]

To see what the network sees:

    python eval/crop_sheet.py --image photo.jpg --out sheet.png --crops.global_crops_size 224 --seed 0

What is random is drawn first (`draw_views`) and done after (`apply_view`, here, or a whole batch at once in
ssl/data/device_crops.py).

The order of the operations is DINO's: crop and resize, flip, color jitter, gray, blur, solarize. Resizing is
PyTorch's antialiased bicubic on uint8, within 2 gray levels of Pillow's, which DINO used: OpenCV's cubic does not
antialias (4 to 9 gray levels off on average where it shrinks by 1.5 to 3) and its area filter is blurrier and slower.
Colors and blur are OpenCV's, rounded where torchvision truncates: within 2 gray levels of it. Hue goes through 8 bits,
1 level off on average and 12 at most in the purest colors; Pillow's hue, DINO's, is up to 18 off. DINO's own blur was
Pillow's approximation by three box filters of the same standard deviation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from skipless.common.pixels import crop_box, resample, uniform
from skipless.datasets.images import ImageSource, UnreadableImage

TRIES = 100  # images to try in place of an unreadable one

Read = TypeVar("Read")


@dataclass
class Crops:
    """Settings of the multi-crop augmentation. The defaults are DINO's for ViT-S/16 on ImageNet.

    Raises ValueError for values out of range.
    """

    global_crops_size: int = 224
    """Side of the two global crops in pixels; a multiple of the patch size. More than the short side of the images
    gains nothing; half the side makes training about four times as fast."""
    global_crops_scale: tuple[float, float] = (0.4, 1.0)
    """Range of a global crop's area, as a share of the image's. Without local crops lower the first number, to 0.14."""
    local_crops_size: int = 96
    """Side of the local crops in pixels; a multiple of the patch size, usually 3/7 to 1/2 of `global_crops_size`."""
    local_crops_number: int = 8
    """Local crops per image, seen by the student alone. At the default sizes one costs a fifth of a global crop; 0
    trains on the two global crops alone."""
    local_crops_scale: tuple[float, float] = (0.05, 0.4)
    """Range of a local crop's area, as a share of the image's; its end is usually the start of `global_crops_scale`."""
    gram_teacher_crops_size: int | None = None
    """Side in pixels of the global crops that Gram's teacher sees, if it is to see more of them (DINOv3: twice their
    side); by default it sees the student's."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of the changes of brightness, contrast, saturation (factors from 1 - x to 1 + x) and hue (shift of up to
    x turns of the color circle, at most 0.5). Lower them where color tells objects apart, as in microscopy."""
    jitter_probability: float = 0.8
    """Share of the views with color jitter."""
    gray_probability: float = 0.2
    """Share of the views without color."""
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Share of the views with Gaussian blur: of the first global crops, the second, and the local ones."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels. It suits crops of 224 and 96 pixels: scale its end down with
    them."""
    solarize_probability: float = 0.2
    """Share of the second global crops in which values of 128 and above are inverted."""
    device: Literal["auto", "cpu", "device"] = "auto"
    """Where the crops are made: by the loader's processes (cpu), or in batches where the model trains (device), which
    decodes JPEGs there too (nvJPEG) and leaves the loader little to do. auto: by the loader without CUDA; with CUDA the
    loader decodes and the device makes the crops, if those of a test picture come out as they should. They are the
    same, to a tenth of a gray level on average. (What runs on CUDA is tested on a CPU; it has not run on a GPU.)"""

    @property
    def sizes(self) -> int:
        """How many sizes of crops the student sees."""
        return 2 if self.local_crops_number else 1

    def __post_init__(self) -> None:
        def check(name: str, fits: bool, rule: str) -> None:
            if not fits:
                raise ValueError(f"crops.{name} is {getattr(self, name)}: {rule}")

        for name in ("global_crops_size", "local_crops_size"):
            check(name, getattr(self, name) >= 1, "it must be at least 1 pixel")
        check("gram_teacher_crops_size", self.gram_teacher_crops_size != 0, "it must be at least 1 pixel")
        check("local_crops_number", 0 <= self.local_crops_number <= 1000, "it must be 0 to 1000")
        for name in ("global_crops_scale", "local_crops_scale"):
            low, high = getattr(self, name)
            check(name, 0 < low <= high <= 1, "it must be two rising shares of the area in (0, 1]")
        jitter, limits = self.color_jitter, (math.inf, math.inf, math.inf, 0.5)
        fits = all(0 <= strength <= limit for strength, limit in zip(jitter, limits, strict=True))
        check("color_jitter", fits, "each of its four strengths must be 0 or more, the last (hue) at most 0.5")
        for name in ("jitter_probability", "gray_probability", "blur_probability", "solarize_probability"):
            value = getattr(self, name)
            shares = value if isinstance(value, Sequence) else (value,)
            check(name, all(0 <= share <= 1 for share in shares), "probabilities must be in [0, 1]")
        low, high = self.blur_sigma
        check("blur_sigma", 0 < low <= high <= 100, "it must be two rising positive numbers of pixels, at most 100")


class View(NamedTuple):
    """All that is random in one view of an image of known size."""

    box: tuple[int, int, int, int]
    """Top, left, height and width of the crop in pixels."""
    flip: bool
    factors: tuple[float, float, float, float]
    """Of brightness, contrast and saturation; turns of hue. (1, 1, 1, 0) without color jitter."""
    order: tuple[int, ...]
    """Of the four color operations, as positions in `factors`; () without color jitter."""
    gray: bool
    sigma: float
    """Of the blur, in pixels; 0 without."""
    solarize: bool


def draw_views(crops: Crops, rows: int, columns: int, rng: np.random.Generator) -> list[View]:
    """What is random in the views of an image of rows x columns pixels, in the order of `multicrop`.

    The size is that of the decoded image: of a photograph that is decoded at half its size, half the size.
    """
    views = []
    for number in range(2 + crops.local_crops_number):
        box = crop_box(rows, columns, crops.global_crops_scale if number < 2 else crops.local_crops_scale, rng)
        flip = rng.random() < 0.5
        jitter = rng.random() < crops.jitter_probability
        factors, order = draw_jitter(crops.color_jitter, rng) if jitter else ((1.0, 1.0, 1.0, 0.0), ())
        gray = rng.random() < crops.gray_probability
        blur = rng.random() < crops.blur_probability[min(number, 2)]
        sigma = uniform(rng, *crops.blur_sigma) if blur else 0.0
        solarize = number == 1 and rng.random() < crops.solarize_probability
        views.append(View(box, flip, factors, order, gray, sigma, solarize))
    return views


def apply_view(image: np.ndarray, view: View, size: int) -> np.ndarray:
    """One view of uint8 [H, W, 3], uint8 [size, size, 3]."""
    top, left, height, width = view.box
    pixels = resample(image[top : top + height, left : left + width], size, size)
    if view.flip:
        pixels = cv2.flip(pixels, 1)
    pixels = color_jitter(pixels, view.factors, view.order)
    if view.gray:
        pixels = gray(pixels)
    if view.sigma:
        pixels = gaussian_blur(pixels, view.sigma)
    return solarize(pixels) if view.solarize else pixels


def multicrop(image: np.ndarray, crops: Crops, rng: np.random.Generator) -> list[np.ndarray]:
    """Random views of one image: [global 1, global 2, local 1, ...], each uint8 [S, S, 3] of its own size S. With
    `gram_teacher_crops_size` the two global ones are repeated at that size, at the end.

    `image`: uint8 [H, W, 3] RGB of any size, left as it is. Draws from `rng` alone: the same state gives the same
    views.
    """
    rows, columns = image.shape[:2]
    views = draw_views(crops, rows, columns, rng)
    sizes = [crops.global_crops_size] * 2 + [crops.local_crops_size] * crops.local_crops_number
    return [apply_view(image, view, size) for view, size in zip(views, sizes, strict=True)] + [
        apply_view(image, view, size) for view, size in larger_views(views, crops)
    ]


def larger_views(views: Sequence[View], crops: Crops) -> list[tuple[View, int]]:
    """What Gram's teacher sees of the two global crops, and its side; nothing where it sees those themselves."""
    size = crops.gram_teacher_crops_size
    if size is None:
        return []
    return [(view._replace(sigma=view.sigma * size / crops.global_crops_size), size) for view in views[:2]]


def draw_jitter(
    strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> tuple[tuple[float, float, float, float], tuple[int, ...]]:
    """Factors and order (see `View`) of a random change of colors."""
    brightness, contrast, saturation = (uniform(rng, max(0.0, 1 - x), 1 + x) for x in strengths[:3])
    hue = uniform(rng, -strengths[3], strengths[3])
    return (brightness, contrast, saturation, hue), tuple(rng.permutation(4).tolist())


def color_jitter(pixels: np.ndarray, factors: tuple[float, float, float, float], order: tuple[int, ...]) -> np.ndarray:
    """Change brightness, contrast, saturation and hue, in this order of them."""
    operations = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for operation in order:
        pixels = operations[operation](pixels, factors[operation])
    return pixels


IDENTITY = np.eye(3)
LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601


def _scale(view: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
    """factor * view + shift, rounded and kept within 0..255."""
    return cv2.addWeighted(view, factor, view, 0, shift)


def adjust_brightness(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: 0 is black, 1 the same, 2 twice as bright."""
    return _scale(view, factor)


def adjust_contrast(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean gray level: 0 is flat, 1 the same, 2 twice the contrast."""
    mean = cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0]
    return _scale(view, factor, mean * (1 - factor))


def adjust_saturation(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the gray picture: 0 is gray, 1 the same, 2 twice as colorful."""
    return cv2.transform(view, factor * IDENTITY + (1 - factor) * LUMA)


def adjust_hue(view: np.ndarray, turns: float) -> np.ndarray:
    """Shift the hue by a part of the color circle, in [-0.5, 0.5]. In steps of 1/256, as Pillow's HSV: OpenCV's other
    8-bit HSV has 180."""
    steps = round(turns * 256) % 256
    if steps == 0:
        return view
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    shift = np.zeros(hsv.shape[1:], np.uint8)
    shift[:, 0] = steps
    # Wraps. Row upon row of adjacent bytes: adding to the first of every three is seven times slower.
    rows = hsv.reshape(len(hsv), -1)
    np.add(rows, shift.ravel(), out=rows)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def gray(view: np.ndarray) -> np.ndarray:
    """Luma of ITU-R BT.601 in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with a standard deviation in pixels, cut at 3 of them.

    The bytes of OpenCV's GaussianBlur (a level off in one image of 25, where a weight is rounded otherwise), which for
    wide kernels takes three times as long.
    """
    kernel = blur_kernel(sigma)
    return cv2.sepFilter2D(view, -1, kernel, kernel)


def blur_kernel(sigma: float) -> np.ndarray:
    """A Gaussian in multiples of 1/256 that add up to 1, float64 [K] with odd K of about six standard deviations.

    Each weight takes over the rounding error of those further out, as in OpenCV.
    """
    reach = (round(6 * sigma + 1) | 1) // 2
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in range(reach, -1, -1)]
    total = 2 * sum(weights) - weights[-1]
    tails = [round(256 * tail / total) for tail in accumulate(weights[:-1])]
    half = [wide - narrow for wide, narrow in zip(tails, [0, *tails], strict=False)]
    return np.array([*half, 256 - 2 * sum(half), *half[::-1]]) / 256


def solarize(view: np.ndarray) -> np.ndarray:
    """Invert values of 128 and above."""
    return cv2.min(view, cv2.bitwise_not(view))


@dataclass(frozen=True, eq=False)
class Sample:
    """What CropDataset gives for one key."""

    views: list[np.ndarray]
    """As `multicrop` returns them."""
    index: int
    """Of the image the views show: not the one asked for where that was unreadable."""
    unreadable: list[str]
    """`path: reason` of images passed over on the way."""
    larger: list[np.ndarray] = field(default_factory=list)
    """The two global crops once more, with more pixels, see `gram_teacher_crops_size`."""


def smallest_side(crops: Crops) -> int:
    """Short side at which the smallest square crops of a square image need no enlarging."""
    largest = max(crops.global_crops_size, crops.gram_teacher_crops_size or 0)
    sides = [largest / math.sqrt(crops.global_crops_scale[0])]
    if crops.local_crops_number:
        sides.append(crops.local_crops_size / math.sqrt(crops.local_crops_scale[0]))
    return math.ceil(max(sides))


def first_readable(images: ImageSource, index: int, read: Callable[[int], Read]) -> tuple[Read, int, list[str]]:
    """What `read` gives for the first image from `index` on for which it does not raise UnreadableImage; that image;
    and `path: reason` of the others. Raises ValueError when 100 in a row, or all of a smaller source, cannot be read.
    """
    unreadable: list[str] = []
    for step in range(min(TRIES, len(images))):
        position = (index + step) % len(images)
        try:
            return read(position), position, unreadable
        except UnreadableImage as error:
            unreadable.append(str(error))
    raise ValueError(f"{len(unreadable)} images in a row cannot be read, the first of them {unreadable[0]}")


class CropDataset(Dataset[Sample]):
    """Multi-crop views of an image source, for a DataLoader whose sampler yields keys (epoch, index).

    The views depend on (seed, epoch, index) alone, whatever the number of workers and the order of the keys. In place
    of an unreadable image comes the next readable one, with the same random numbers. Raises ValueError where
    `first_readable` does.

        loader = DataLoader(CropDataset(images, Crops(), seed=0), batch_size=64, sampler=keys, collate_fn=collate)
    """

    def __init__(self, images: ImageSource, crops: Crops, seed: int) -> None:
        self.images = images
        self.crops = crops
        self.seed = seed
        self.min_side = smallest_side(crops)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        # Workers share the cores: threads of OpenCV's own would only fight over them.
        cv2.setNumThreads(0)
        epoch, index = int(key[0]), int(key[1])
        image, position, unreadable = first_readable(
            self.images, index, lambda position: self.images.read(position, self.min_side)
        )
        rng = np.random.default_rng((self.seed, epoch, index))
        views, count = multicrop(image, self.crops, rng), 2 + self.crops.local_crops_number
        return Sample(views[:count], position, unreadable, views[count:])


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples of a batch, view by view.

    Returns {"global": uint8 [2, B, G, G, 3], "local": uint8 [L, B, S, S, 3] or None without local crops, "larger":
    the same of those of Gram's teacher, "index": int64 [B], "unreadable": list of `path: reason`}.
    """

    def stacked(views: list[list[np.ndarray]]) -> Tensor | None:
        columns = [np.stack(column) for column in zip(*views, strict=True)]
        return torch.from_numpy(np.stack(columns)) if columns else None

    return {
        "global": stacked([sample.views[:2] for sample in samples]),
        "local": stacked([sample.views[2:] for sample in samples]),
        "larger": stacked([sample.larger for sample in samples]),
        "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        "unreadable": [line for sample in samples for line in sample.unreadable],
    }
