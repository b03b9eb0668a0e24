"""DINO's multi-crop augmentation on uint8 images (Caron et al., arXiv 2104.14294, appendix, and arXiv 2006.09882).

    views = multicrop(image, Crops(), np.random.default_rng(0))  # 2 global and 8 local crops, uint8 [S, S, 3]

To see what the network sees:

    python ssl/crops.py --image photo.jpg --out sheet.png --crops.global_size 224 --seed 0

The order of the operations is DINO's: crop and resize, flip, colour jitter, grey, blur, solarize. Resizing is
PyTorch's antialiased bicubic on uint8, within 2 grey levels of Pillow's, which DINO used: OpenCV's cubic does not
antialias (4 to 9 grey levels off on average where it shrinks by 1.5 to 3) and its area filter is blurrier and slower.
Colours and blur are OpenCV's, rounded where torchvision truncates: within 2 grey levels of it. Hue goes through 8 bits,
1 level off on average and 12 at most in the purest colours; Pillow's hue, DINO's, is up to 18 off. DINO's own blur was
Pillow's approximation by three box filters of the same standard deviation.
"""

import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from skipless.datasets.images import ImageSource, UnreadableImage, read_image

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
RATIO = (3 / 4, 4 / 3)  # width to height of a crop
TRIES = 100  # images to try in place of an unreadable one


class Images(Protocol):
    """A set of images that can be read one by one, as uint8 [H, W, 3]."""

    def __len__(self) -> int: ...
    def read(self, index: int, /) -> np.ndarray: ...


@dataclass
class Crops:
    """Settings of the multi-crop augmentation. The defaults are DINO's for ViT-S/16 on ImageNet.

    Raises ValueError for values out of range.
    """

    global_size: int = 224
    """Side of the two global crops in pixels; a multiple of the patch size. More than the short side of the images
    gains nothing; half the side makes training about four times as fast."""
    global_scale: tuple[float, float] = (0.4, 1.0)
    """Range of a global crop's area, as a share of the image's. Without local crops lower the first number, to 0.14."""
    local_size: int = 96
    """Side of the local crops in pixels; a multiple of the patch size, usually 3/7 to 1/2 of `global_size`."""
    local_count: int = 8
    """Local crops per image, seen by the student alone. At the default sizes one costs a fifth of a global crop; 0
    trains on the two global crops alone."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Range of a local crop's area, as a share of the image's; its end is usually the start of `global_scale`."""
    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of the changes of brightness, contrast, saturation (factors from 1 - x to 1 + x) and hue (shift of up to
    x turns of the colour circle, at most 0.5). Lower them where colour tells objects apart, as in microscopy."""
    jitter_probability: float = 0.8
    """Share of the views with colour jitter."""
    grey_probability: float = 0.2
    """Share of the views without colour."""
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Share of the views with Gaussian blur: of the first global crops, the second, and the local ones."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels. It suits crops of 224 and 96 pixels: scale its end down with
    them."""
    solarize_probability: float = 0.2
    """Share of the second global crops in which values of 128 and above are inverted."""

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"crops.{name} is {getattr(self, name)}: it must be at least 1 pixel")
        if self.local_count < 0:
            raise ValueError(f"crops.local_count is {self.local_count}: it must be 0 or more")
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"crops.{name} is ({low}, {high}): it must be two rising shares of the area in (0, 1]")
        for strength, limit in zip(self.color_jitter, (math.inf, math.inf, math.inf, 0.5), strict=True):
            if not 0 <= strength <= limit:
                raise ValueError(
                    f"crops.color_jitter is {self.color_jitter}: "
                    "each of its four strengths must be 0 or more, the last (hue) at most 0.5"
                )
        for name in ("jitter_probability", "grey_probability", "blur_probability", "solarize_probability"):
            value = getattr(self, name)
            if not all(0 <= share <= 1 for share in (value if isinstance(value, Sequence) else (value,))):
                raise ValueError(f"crops.{name} is {value}: probabilities must be in [0, 1]")
        low, high = self.blur_sigma
        if not 0 < low <= high < math.inf:
            raise ValueError(f"crops.blur_sigma is ({low}, {high}): it must be two rising positive numbers of pixels")


def multicrop(image: np.ndarray, crops: Crops, rng: np.random.Generator) -> list[np.ndarray]:
    """Random views of one image: [global 1, global 2, local 1, ...], each uint8 [S, S, 3] of its own size S.

    `image`: uint8 [H, W, 3] RGB of any size, left as it is. Draws from `rng` alone: the same state gives the same
    views. Raises ValueError for another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"the image is {image.dtype} {list(image.shape)}: crops are cut from uint8 [H, W, 3]")
    views = []
    rows, columns = image.shape[:2]
    for number in range(2 + crops.local_count):
        size, scale = (crops.global_size, crops.global_scale) if number < 2 else (crops.local_size, crops.local_scale)
        top, left, height, width = crop_box(rows, columns, scale, rng)
        view = resample(image[top : top + height, left : left + width], size, size)
        if rng.random() < 0.5:
            view = cv2.flip(view, 1)
        if rng.random() < crops.jitter_probability:
            view = color_jitter(view, crops.color_jitter, rng)
        if rng.random() < crops.grey_probability:
            view = grey(view)
        if rng.random() < crops.blur_probability[min(number, 2)]:
            view = gaussian_blur(view, rng.uniform(*crops.blur_sigma))
        if number == 1 and rng.random() < crops.solarize_probability:
            view = solarize(view)
        views.append(view)
    return views


def crop_box(
    height: int, width: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, by the law of torchvision's RandomResizedCrop (Szegedy et al.,
    arXiv 1409.4842, section 6): area uniform in `scale`, logarithm of the ratio uniform, ten tries, then the largest
    central crop of a ratio within bounds."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize uint8 [H, W, 3] by bicubic interpolation, antialiased when it shrinks: Pillow's, within 2 grey levels."""
    if image.shape[:2] == (height, width):
        return np.array(image)
    # With the batch dimension in front, torch sees pixels whose channels come last, and neither copies nor transposes:
    # half the time. A part of an image is resized where it lies.
    pixels = torch.from_numpy(np.require(image, requirements=["W"]))[None].permute(0, 3, 1, 2)
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


def color_jitter(
    view: np.ndarray, strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue by random amounts, in random order."""
    brightness, contrast, saturation = (rng.uniform(max(0.0, 1 - x), 1 + x) for x in strengths[:3])
    hue = rng.uniform(-strengths[3], strengths[3])
    for operation in rng.permutation(4):
        if operation == 0:
            view = adjust_brightness(view, brightness)
        elif operation == 1:
            view = adjust_contrast(view, contrast)
        elif operation == 2:
            view = adjust_saturation(view, saturation)
        else:
            view = adjust_hue(view, hue)
    return view


INVERTED_BRIGHT = np.concatenate([np.arange(128), np.arange(127, -1, -1)]).astype(np.uint8)


def _scale(view: np.ndarray, factor: float, shift: float = 0.0) -> np.ndarray:
    """factor * view + shift, rounded and kept within 0..255."""
    return cv2.addWeighted(view, factor, view, 0, shift)


def adjust_brightness(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black: 0 is black, 1 the same, 2 twice as bright."""
    return _scale(view, factor)


def adjust_contrast(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean grey level: 0 is flat, 1 the same, 2 twice the contrast."""
    mean = cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0]
    return _scale(view, factor, mean * (1 - factor))


def adjust_saturation(view: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the grey picture: 0 is grey, 1 the same, 2 twice as colourful."""
    return cv2.transform(view, factor * np.eye(3) + (1 - factor) * np.array([0.299, 0.587, 0.114]))


def adjust_hue(view: np.ndarray, turns: float) -> np.ndarray:
    """Shift the hue by a part of the colour circle, in [-0.5, 0.5]. In steps of 1/256, as Pillow's HSV: OpenCV's other
    8-bit HSV has 180."""
    steps = round(turns * 256) % 256
    if steps == 0:
        return view
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(steps)  # wraps
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grey(view: np.ndarray) -> np.ndarray:
    """Luma of ITU-R BT.601 in all three channels."""
    return cv2.cvtColor(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(view: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur with a standard deviation in pixels, cut at 3 of them."""
    return cv2.GaussianBlur(view, (0, 0), sigma)


def solarize(view: np.ndarray) -> np.ndarray:
    """Invert values of 128 and above."""
    return cv2.LUT(view, INVERTED_BRIGHT)


@dataclass(frozen=True, eq=False)
class Sample:
    """What CropDataset gives for one key."""

    views: list[np.ndarray]
    """As `multicrop` returns them."""
    index: int
    """Of the image the views show: not the one asked for where that was unreadable."""
    unreadable: list[str]
    """`path: reason` of images passed over on the way."""


class CropDataset(Dataset[Sample]):
    """Multi-crop views of an image source, for a DataLoader whose sampler yields keys (epoch, index).

    The views depend on (seed, epoch, index) alone, whatever the number of workers and the order of the keys. In place
    of an unreadable image comes the next readable one, with the same random numbers. Raises ValueError when 100 images
    in a row, or all of a smaller source, cannot be read.

        loader = DataLoader(CropDataset(images, Crops(), seed=0), batch_size=64, sampler=keys, collate_fn=collate)
    """

    def __init__(self, images: ImageSource, crops: Crops, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must be 0 or more")
        self.images = images
        self.crops = crops
        self.seed = seed
        # Short side at which the smallest square crops of a square image need no enlarging.
        sides = [crops.global_size / math.sqrt(crops.global_scale[0])]
        if crops.local_count:
            sides.append(crops.local_size / math.sqrt(crops.local_scale[0]))
        self.min_side = math.ceil(max(sides))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        # Workers share the cores: threads of OpenCV's own would only fight over them.
        cv2.setNumThreads(0)
        epoch, index = int(key[0]), int(key[1])
        rng = np.random.default_rng((self.seed, epoch, index))
        unreadable: list[str] = []
        for step in range(min(TRIES, len(self.images))):
            position = (index + step) % len(self.images)
            try:
                image = self.images.read(position, self.min_side)
            except UnreadableImage as error:
                unreadable.append(str(error))
                continue
            return Sample(multicrop(image, self.crops, rng), position, unreadable)
        raise ValueError(f"{len(unreadable)} images in a row cannot be read, the first of them {unreadable[0]}")


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples of a batch, view by view.

    Returns {"global": uint8 [2, B, G, G, 3], "local": uint8 [L, B, S, S, 3] or None without local crops,
    "index": int64 [B], "unreadable": list of `path: reason`}.
    """
    columns = list(zip(*(sample.views for sample in samples), strict=True))
    return {
        "global": torch.from_numpy(np.stack([np.stack(column) for column in columns[:2]])),
        "local": torch.from_numpy(np.stack([np.stack(column) for column in columns[2:]])) if columns[2:] else None,
        "index": torch.tensor([sample.index for sample in samples], dtype=torch.int64),
        "unreadable": [line for sample in samples for line in sample.unreadable],
    }


def normalize(views: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 [V, B, H, W, 3] -> `dtype` [V*B, 3, H, W], view by view, with ImageNet's mean and standard deviation.

    Runs where `views` are, without a transfer or a wait; the arithmetic is float32 or wider whatever `dtype` is.
    """
    pixels = views.flatten(0, 1).permute(0, 3, 1, 2)
    normalized = torch.empty(pixels.shape, dtype=dtype, device=views.device)
    # Channel by channel, with Python numbers: a tensor of constants would have to be copied to the device.
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        wide = pixels[:, channel].to(torch.promote_types(dtype, torch.float32))
        normalized[:, channel] = wide.sub_(255 * mean).div_(255 * std)
    return normalized


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


def sheet(image: np.ndarray, crops: Crops, seed: int) -> np.ndarray:
    """Picture of the views of one image, uint8 [H, W, 3]: four rows, the first four epochs of this seed.

    A row shows the whole image, the two global crops, and the local ones in as many lines as fit beside them.
    """
    gap = 4
    size = max(crops.global_size, crops.local_size if crops.local_count else 0)
    lines = max(1, (size + gap) // (crops.local_size + gap))
    columns = math.ceil(crops.local_count / lines)
    thumbnail = resample(image, crops.global_size, max(1, round(crops.global_size * image.shape[1] / image.shape[0])))
    width = thumbnail.shape[1] + 2 * crops.global_size + columns * crops.local_size + (4 + columns) * gap
    canvas = np.full((4 * (size + gap) + gap, width, 3), 255, np.uint8)

    def paste(view: np.ndarray, top: int, left: int) -> int:
        canvas[top : top + view.shape[0], left : left + view.shape[1]] = view
        return left + view.shape[1] + gap

    for epoch in range(4):
        top = gap + epoch * (size + gap)
        views = multicrop(image, crops, np.random.default_rng((seed, epoch, 0)))
        left = gap
        for view in (thumbnail, *views[:2]):
            left = paste(view, top, left)
        for number, view in enumerate(views[2:]):
            line, column = divmod(number, columns)
            paste(view, top + line * (crops.local_size + gap), left + column * (crops.local_size + gap))
    return canvas


def show(image: Path, out: Path, crops: Crops, seed: int = 0) -> None:
    """Write a sheet of the views a network sees of one image.

    Args:
        image: The image file: JPEG, PNG, WebP or BMP.
        out: Where to write the sheet: .png or .jpg.
        crops: The augmentation.
        seed: Another number shows other views.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ValueError(f"--out is {out}: the name of the sheet must end in .png or .jpg")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"--out is {out}: there is no folder {out.parent}")
    if seed < 0:
        raise ValueError(f"--seed is {seed}: it must be 0 or more")
    picture = sheet(read_image(image), crops, seed)
    data = cv2.imencode(out.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, out)
    print(
        f"{out}: {picture.shape[1]} x {picture.shape[0]} pixels; a row: the image, 2 global, {crops.local_count} local"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description="Write a sheet of the multi-crop views a network sees of one image.")
    parser.add_function_arguments(show)
    settings = parser.parse_args(arguments)
    try:
        show(**parser.instantiate(settings).as_dict())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
