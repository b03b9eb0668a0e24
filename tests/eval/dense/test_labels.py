"""Labels of patches and of pixels: shares of classes by hand and by a plain loop, resizing by hand."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from skipless.datasets.labels.masks import VOID
from skipless.eval.dense.labels import label_shares, resize_logits


def test_shares_by_hand() -> None:
    """A row of 5 pixels on 2 patches: centers at 0.1, 0.3, 0.5, 0.7 and 0.9 of the side, and 0.5 belongs to the
    second."""
    shares = label_shares(np.array([[0, 1, 1, 1, VOID]], np.uint8), 1, 2, 2)
    np.testing.assert_allclose(shares, [[[1 / 2, 1 / 2], [0, 2 / 3]]])
    assert shares.dtype == np.float32
    quarters = np.array([[0, 1, 2, 2], [1, 1, 2, 2], [0, 0, VOID, VOID], [0, 0, VOID, VOID]], np.uint8)
    expected = [[[0.25, 0.75, 0], [0, 0, 1]], [[1, 0, 0], [0, 0, 0]]]
    np.testing.assert_allclose(label_shares(quarters, 2, 2, 3), expected)


def test_shares_of_a_mask_smaller_than_the_grid() -> None:
    """Two pixels on five patches: their centers, at 1/4 and 3/4, lie in the second and in the fourth."""
    shares = label_shares(np.array([[1, 0]], np.uint8), 1, 5, 2)
    np.testing.assert_allclose(shares[0], [[0, 0], [0, 1], [0, 0], [1, 0], [0, 0]])


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_shares_are_those_of_a_plain_loop(height: int, width: int, h: int, w: int, seed: int) -> None:
    mask = np.random.default_rng(seed).choice([0, 1, 2, VOID], (height, width)).astype(np.uint8)
    members: dict[tuple[int, int], list[int]] = {}
    for y in range(height):
        for x in range(width):
            # Exact in integers: the center (y + 1/2) / height lies in patch row p when p / h <= it < (p + 1) / h.
            row = next(p for p in range(h) if (2 * y + 1) * h < 2 * height * (p + 1))
            column = next(p for p in range(w) if (2 * x + 1) * w < 2 * width * (p + 1))
            members.setdefault((row, column), []).append(int(mask[y, x]))
    shares = label_shares(mask, h, w, 3)
    for row in range(h):
        for column in range(w):
            labels = members.get((row, column), [])
            expected = [labels.count(label) / max(1, len(labels)) for label in range(3)]
            np.testing.assert_allclose(shares[row, column], expected, rtol=1e-6)


def test_logits_are_resized_bilinearly_with_half_pixel_centers() -> None:
    """From 2 to 4, the centers of the new pixels lie at -1/4 (clamped to 0), 1/4, 3/4 and 5/4 (clamped to 1)."""
    corners = torch.tensor([[0.0, 4.0], [8.0, 16.0]])
    expected = [[0, 1, 3, 4], [2, 3.25, 5.75, 7], [6, 7.75, 11.25, 13], [8, 10, 14, 16]]
    np.testing.assert_allclose(resize_logits(corners[None, None], (4, 4))[0, 0], expected)
