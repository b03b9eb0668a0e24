"""Images and masks cut, resized and distorted together: by hand, by their edges, and with a scripted generator."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipless.datasets.labels.masks import VOID
from skipless.eval.dense.augmentation import (
    photometric_distortion,
    resize_image,
    resize_mask,
    resized_crop,
    scale_and_crop,
    size_within,
)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((375, 500), (512, 683)),  # 500 * 512 / 375 = 682.67
        ((500, 375), (683, 512)),
        ((512, 512), (512, 512)),
        ((100, 1000), (205, 2048)),  # the long side binds: 204.8
        ((1, 5000), (1, 2048)),  # 0.4 would leave nothing
    ],
)
def test_size_within_by_hand(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert size_within(*size, 2048, 512) == expected


def test_masks_are_resized_by_the_label_at_the_center() -> None:
    """From 5 to 3 the centers lie at 5/6, 5/2 and 25/6: labels 0, 2 and 4. From 4 to 2 they lie on the edges 1 and 3,
    which belong to the label after them."""
    assert resize_mask(np.array([[7, 8, 9, VOID, 1]], np.uint8), 1, 3).tolist() == [[7, 9, 1]]
    assert resize_mask(np.array([[7, 8, 9, VOID]], np.uint8), 1, 2).tolist() == [[8, VOID]]
    # mmcv's: the new pixel i of 3 looks at floor(5 i / 3) = 0, 1, 3.
    assert resize_mask(np.array([[7, 8, 9, VOID, 1]], np.uint8), 1, 3, "opencv").tolist() == [[7, 8, VOID]]
    assert resize_mask(np.array([[1, 2], [3, 4]], np.uint8), 4, 4).tolist() == [
        [1, 1, 2, 2],
        [1, 1, 2, 2],
        [3, 3, 4, 4],
        [3, 3, 4, 4],
    ]


def test_opencv_does_not_antialias_and_pillow_does() -> None:
    """One bright column of eight, shrunk to two: the taps around 1.5 and 5.5 miss it, a wide triangle does not."""
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 3] = 240
    assert resize_image(image, 8, 2, "opencv").max() == 0
    assert resize_image(image, 8, 2, "pillow")[:, 0].min() > 20


def checked(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An image whose red is 50 times the label of four blobs, and the mask."""
    rng = np.random.default_rng(seed)
    mask = cv2.resize(rng.integers(0, 4, (4, 4), dtype=np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return np.stack([50 * mask, mask * 0, mask * 0 + 99], axis=2), mask


@given(st.integers(20, 90), st.integers(20, 90), st.integers(0, 1000), st.sampled_from(["opencv", "pillow"]))
@settings(max_examples=40)
def test_scale_and_crop_keeps_image_and_mask_together(height: int, width: int, seed: int, library: Any) -> None:
    image, mask = checked(height, width, seed)
    before = image.copy()
    a = (image, mask, np.random.default_rng(seed), (200, 50), (0.5, 2.0), 48, 0.75, 0.5, False, library)
    out, labels, inside = scale_and_crop(*a)
    assert (out.shape, labels.shape, inside.shape) == ((48, 48, 3), (48, 48), (48, 48))
    assert (out.dtype, labels.dtype, inside.dtype) == (np.uint8, np.uint8, bool)
    assert (image == before).all()

    # Padding: below and at the right, label 255; the image has no void of its own.
    np.testing.assert_array_equal(inside, labels != VOID)
    rows, columns = inside.any(1).sum(), inside.any(0).sum()
    assert inside[:rows, :columns].all()
    assert inside.sum() == rows * columns

    # Away from borders of classes, also from those just outside the crop, a pixel's color is that of its label.
    flat = cv2.erode(labels, np.ones((9, 9))) == cv2.dilate(labels, np.ones((9, 9)))
    flat[:4] = flat[-4:] = flat[:, :4] = flat[:, -4:] = False
    flat &= inside
    assert (np.abs(out[..., 0].astype(int) - 50 * labels)[flat] <= 1).all()
    assert (out[..., 2][inside] == 99).all()


def test_scale_and_crop_follows_its_generator() -> None:
    image, mask = checked(60, 80)
    one, same, other = (
        scale_and_crop(image, mask, np.random.default_rng(seed), (200, 50), crop=48) for seed in (1, 1, 2)
    )
    for a, b in zip(one, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one[0], other[0])


def test_sizes_crops_and_flips_are_drawn_as_asked() -> None:
    """Sizes from half to twice 50, half of the crops mirrored (a mask that rises to the right tells)."""
    mask = np.tile(np.arange(100, dtype=np.uint8), (100, 1))
    image = np.zeros((100, 100, 3), np.uint8)
    sides, mirrored, corners = [], [], set()
    rng = np.random.default_rng(0)
    for _ in range(300):
        _, labels, inside = scale_and_crop(image, mask, rng, (200, 50), (0.5, 2.0), 100, 1.0, 0.5, False)
        sides.append(int(inside.any(1).sum()))
        row = labels[0][inside[0]].astype(int)
        mirrored.append(row[0] > row[-1])
    assert 25 <= min(sides) <= 28
    assert 97 <= max(sides) <= 100
    assert np.mean(sides) == pytest.approx(62.5, abs=4)
    assert 0.4 < np.mean(mirrored) < 0.6
    for _ in range(100):
        _, labels, _ = scale_and_crop(image, mask, rng, (200, 100), (1.0, 1.0), 90, 1.0, 0.0, False)
        corners.add(int(labels[0, 0]))
    assert corners == set(range(11))


def test_crops_of_one_class_are_drawn_again_where_others_are_possible() -> None:
    """Class 1 fills the left 8 of 64 columns: of the 49 crops of 16 columns those that start at 0..3 have less than
    75 % of class 0 (at 4 it is 12 of 16). One draw finds one with probability 4 / 49, eleven with 1 - (45 / 49)^11."""
    mask = np.zeros((16, 64), np.uint8)
    mask[:, :8] = 1
    mask[0, :] = VOID
    image = np.zeros((16, 64, 3), np.uint8)
    rng = np.random.default_rng(0)

    def share(limit: float) -> float:
        good = 0
        for _ in range(300):
            _, labels, _ = scale_and_crop(image, mask, rng, (64, 16), (1.0, 1.0), 16, limit, 0.0, False)
            counts = np.bincount(labels[labels != VOID], minlength=2)
            good += counts.max() < 0.75 * counts.sum()
        return good / 300

    assert share(0.75) == pytest.approx(1 - (45 / 49) ** 11, abs=0.1)
    assert share(1.0) == pytest.approx(4 / 49, abs=0.06)


def test_resized_crop_keeps_image_and_mask_together() -> None:
    rng = np.random.default_rng(0)
    image, mask = checked(60, 90, 3)
    mirrored = 0
    ramp = np.tile(np.arange(90, dtype=np.uint8), (60, 1))
    for _ in range(60):
        out, labels = resized_crop(image, mask, rng, 48, (0.8, 1.0))
        assert (out.shape, labels.shape) == ((48, 48, 3), (48, 48))
        flat = cv2.erode(labels, np.ones((7, 7))) == cv2.dilate(labels, np.ones((7, 7)))
        flat[:3] = flat[-3:] = flat[:, :3] = flat[:, -3:] = False
        assert flat.sum() > 300
        assert (np.abs(out[..., 0].astype(int) - 50 * labels)[flat] <= 2).all()
        _, positions = resized_crop(image, ramp, rng, 48, (0.8, 1.0))
        ends = sorted((int(positions[0, 0]), int(positions[0, -1])))
        assert ends[1] - ends[0] > 0.6 * 90  # area over 0.8 and ratio over 3/4
        mirrored += int(positions[0, 0] > positions[0, -1])
    assert 15 <= mirrored <= 45


class Scripted:
    """Stands for a generator: `random` gives the next of a list, `uniform` and `integers` what they are told."""

    def __init__(self, coins: Sequence[float], uniform: float = 0.0, integer: int = 0):
        self.coins, self.value, self.integer = list(coins), uniform, integer
        self.asked: list[tuple[float, float]] = []

    def random(self) -> float:
        return self.coins.pop(0)

    def uniform(self, low: float, high: float) -> float:
        self.asked.append((low, high))
        return self.value

    def integers(self, low: int, high: int) -> int:
        self.asked.append((low, high))
        return self.integer


HEADS_, TAILS = 0.1, 0.9  # below 1/2 a change is made
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)


def distort(rng: Any) -> np.ndarray:
    return photometric_distortion(PIXELS.copy(), rng)


def test_no_distortion_where_no_coin_falls() -> None:
    np.testing.assert_array_equal(distort(Scripted([TAILS] * 5)), PIXELS)


def test_brightness_adds_and_contrast_multiplies_within_the_range_of_bytes() -> None:
    bright = Scripted([HEADS_] + [TAILS] * 4, uniform=-31.5)
    expected = [max(0, math.floor(x - 31.5)) for x in PIXELS.ravel().tolist()]
    assert distort(bright).ravel().tolist() == expected
    assert bright.asked == [(-32, 32)]
    # The second coin says whether contrast comes first or last.
    for coins in ([TAILS, HEADS_, HEADS_, TAILS, TAILS], [TAILS, TAILS, TAILS, TAILS, HEADS_]):
        contrast = Scripted(coins, uniform=1.5)
        assert distort(contrast).ravel().tolist() == [min(255, x * 3 // 2) for x in PIXELS.ravel().tolist()]
        assert contrast.asked == [(0.5, 1.5)]


def test_saturation_and_hue() -> None:
    """On pure colors, where HSV is plain: half the saturation of red is (255, 128, 128); 120 degrees from red lies
    green, that is 60 of 180 units (more than is drawn, but plain)."""
    red = np.full((4, 4, 3), (255, 0, 0), np.uint8)
    saturation = Scripted([TAILS, TAILS, HEADS_, TAILS, TAILS], uniform=0.5)
    np.testing.assert_allclose(photometric_distortion(red, saturation)[0, 0], (255, 128, 128), atol=1)
    assert saturation.asked == [(0.5, 1.5)]
    hue = Scripted([TAILS, TAILS, TAILS, HEADS_, TAILS], integer=60)
    assert photometric_distortion(red, hue)[0, 0].tolist() == [0, 255, 0]
    assert hue.asked == [(-18, 18)]
    back = Scripted([TAILS, TAILS, TAILS, HEADS_, TAILS], integer=-60)
    assert photometric_distortion(red, back)[0, 0].tolist() == [0, 0, 255]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40)
def test_distorted_images_are_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
    before = image.copy()
    out = photometric_distortion(image, rng)
    assert (out.dtype, out.shape) == (np.uint8, image.shape)
    np.testing.assert_array_equal(image, before)
