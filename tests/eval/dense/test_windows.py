"""Sliding windows against a plain reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from skipless.eval.dense.windows import by_shape, cut_windows, mean_of_windows, windows


def test_windows_by_hand() -> None:
    assert windows(512, 700, 512, 341) == [(0, 0, 512, 512), (0, 188, 512, 700)]
    # 853 = 512 + 341 needs two windows, a pixel more a third, moved back by 340.
    assert [left for _, left, _, _ in windows(512, 853, 512, 341)] == [0, 341]
    assert [left for _, left, _, _ in windows(512, 854, 512, 341)] == [0, 341, 342]
    assert windows(10, 7, 8, 8) == [(0, 0, 8, 7), (2, 0, 10, 7)]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.data())
def test_windows_cover_the_image_and_lie_inside(height: int, width: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    boxes = windows(height, width, size, stride)
    covered = np.zeros((height, width), bool)
    for top, left, bottom, right in boxes:
        assert (bottom - top, right - left) == (min(size, height), min(size, width))
        assert top >= 0
        assert left >= 0
        assert bottom <= height
        assert right <= width
        covered[top:bottom, left:right] = True
    assert covered.all()
    assert len(set(boxes)) == len(boxes)


def naive_sliding(image: torch.Tensor, size: int, stride: int) -> torch.Tensor:
    """mmsegmentation's slide inference as its documentation and code describe it: a padded map and a count."""
    _, height, width = image.shape
    grid = [max(side - size + stride - 1, 0) // stride + 1 for side in (height, width)]
    total, count = torch.zeros(2, height, width), torch.zeros(1, height, width)
    for row in range(grid[0]):
        for column in range(grid[1]):
            y2, x2 = min(row * stride + size, height), min(column * stride + size, width)
            y1, x1 = max(y2 - size, 0), max(x2 - size, 0)
            logits = toy_predict(image[None, :, y1:y2, x1:x2])[0]
            total += F.pad(logits, (x1, width - x2, y1, height - y2))
            count += F.pad(torch.ones(1, y2 - y1, x2 - x1), (x1, width - x2, y1, height - y2))
    return total / count


def toy_predict(crops: torch.Tensor) -> torch.Tensor:
    """Two classes; depends on the place within the window, so that windows disagree where they overlap."""
    rows = torch.arange(crops.shape[2])[:, None]
    return torch.stack([crops.sum(1) * (1 + rows), crops[:, 0] - crops.flatten(1).mean(1)[:, None, None]], 1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.data())
@settings(max_examples=40)
def test_sliding_logits_are_the_plain_references(height: int, width: int, size: int, data: st.DataObject) -> None:
    """Also for images smaller than the window."""
    stride = data.draw(st.integers(max(1, size // 3), size))
    image = torch.randn(3, height, width, generator=torch.Generator().manual_seed(height * 41 + width))
    parts = toy_predict(torch.stack(cut_windows(image, size, stride)))
    found = mean_of_windows(parts, height, width, size, stride)
    torch.testing.assert_close(found, naive_sliding(image, size, stride), rtol=1e-4, atol=1e-4)


def test_sliding_logits_keep_the_axes_of_several_heads() -> None:
    image = torch.randn(3, 9, 14, generator=torch.Generator().manual_seed(0))
    parts = toy_predict(torch.stack(cut_windows(image, 8, 5)))
    both = mean_of_windows(torch.stack([parts, -parts], 1), 9, 14, 8, 5)
    assert both.shape == (2, 2, 9, 14)
    torch.testing.assert_close(both[0], naive_sliding(image, 8, 5))
    torch.testing.assert_close(both[1], -both[0])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_images_of_one_shape_go_through_the_network_together_and_come_out_in_order(batch_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator) for size in [(4, 6), (6, 4), (4, 6), (4, 6), (2, 2), (6, 4)]]
    seen = []

    def network(batch: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(batch.shape))
        return batch.sum((2, 3))

    found = by_shape(network, images, batch_size)
    torch.testing.assert_close(torch.stack(found), torch.stack([image.sum((1, 2)) for image in images]))
    shapes = {1: [(1, 4, 6)] * 3 + [(1, 6, 4)] * 2, 2: [(2, 4, 6), (1, 4, 6), (2, 6, 4)], 3: [(3, 4, 6), (2, 6, 4)]}
    expected = [*shapes.get(batch_size, shapes[3]), (1, 2, 2)]
    assert sorted(seen) == sorted((count, 3, *size) for count, *size in expected)
