"""Masks against an implementation of BEiT's algorithm 1, with DINOv2's numbers, that shares nothing with ours."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from skipless.ssl.data.masks import collate_masks, draw_mask, draw_masks


def reference(side: int, count: int, rng: random.Random) -> set[tuple[int, int]]:
    """Blocks as sets of cells; log-uniform ratio by the exponent of a base; ten tries for each block."""
    masked: set[tuple[int, int]] = set()
    while len(masked) < count:
        for _ in range(10):
            room = min(count - len(masked), side * side // 2)
            low, high = sorted((4, room))
            area = rng.uniform(low, high) if room >= 4 else rng.uniform(room, room)
            ratio = 0.3 ** rng.uniform(-1, 1)
            a, b = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if a >= side or b >= side or a < 1 or b < 1:
                continue
            top, left = rng.randint(0, side - a), rng.randint(0, side - b)
            block = {(i, j) for i in range(top, top + a) for j in range(left, left + b)}
            if 0 < len(block - masked) <= room:
                masked |= block
                break
        else:
            break
    return masked


def shapes(masks: list[np.ndarray]) -> dict[str, list[float]]:
    """Of each mask: how much is masked, how it spreads over rows and columns, and its rim."""
    found: dict[str, list[float]] = {"patches": [], "rows": [], "columns": [], "rim": []}
    for mask in masks:
        found["patches"].append(mask.sum())
        found["rows"].append(mask.any(1).sum())
        found["columns"].append(mask.any(0).sum())
        found["rim"].append((mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum())
    return found


@pytest.mark.parametrize("side", [14, 6])
def test_shares_and_shapes_are_the_published_ones(side: int) -> None:
    rng, other = np.random.default_rng(0), random.Random(1)
    ours, theirs = [], []
    for _ in range(1500):
        ours.append(draw_mask(side, side, int(side**2 * rng.uniform(0.1, 0.5)), rng))
        mask = np.zeros((side, side), bool)
        for cell in reference(side, int(side**2 * other.uniform(0.1, 0.5)), other):
            mask[cell] = True
        theirs.append(mask)
    for name, values in shapes(ours).items():
        assert ks_2samp(values, shapes(theirs)[name]).pvalue > 0.001, name


def test_half_of_the_crops_lose_a_tenth_to_a_half() -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([draw_masks(14, 0.5, (0.1, 0.5), rng) for _ in range(1000)])
    shares = masks.mean(2).ravel()
    assert np.mean(shares > 0) == pytest.approx(0.5, abs=0.05)
    assert shares.max() <= 0.5
    assert shares[shares > 0].mean() == pytest.approx(0.3, abs=0.02)
    assert np.mean(masks[:, 0].any(1) == masks[:, 1].any(1)) == pytest.approx(0.5, abs=0.07)  # each for itself


def test_masks_of_a_batch_go_view_by_view() -> None:
    images = np.zeros((2, 2, 4), bool)  # images, crops, patches
    images[0, 0, [1, 2]] = images[1, 1, 3] = True
    patches, read, weights = collate_masks(list(images))
    assert patches is not None
    assert read is not None
    assert weights is not None
    assert patches.nonzero().tolist() == [[0, 1], [0, 2], [3, 3]]
    assert read.tolist() == [1, 2, 15]
    torch.testing.assert_close(weights, torch.tensor([1 / 8, 1 / 8, 1 / 4]))
