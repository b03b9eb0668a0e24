"""Scores of segmentations against scikit-learn, sliding windows against a plain reference, resizing by hand."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from skipless.datasets.labels.masks import VOID
from skipless.eval.dense.labels import resize_logits
from skipless.eval.dense.windows import by_shape, cut_windows, mean_of_windows, windows
from skipless.eval.metrics import bootstrap_interval, box_iou, confusion_matrix, corloc, segmentation_scores

# Scores ---------------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=40)
def test_scores_are_scikit_learns(data: st.DataObject) -> None:
    """Random maps of two images, with void pixels and classes that occur in one of the two or in neither."""
    classes = data.draw(st.integers(2, 8))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    true_of = rng.choice(classes, rng.integers(1, classes + 1), replace=False)
    predicted_of = rng.choice(classes, rng.integers(1, classes + 1), replace=False)
    truths = [rng.choice([*true_of, VOID], size).astype(np.uint8) for size in ((5, 7), (4, 3))]
    truths[0][0, 0] = true_of[0]
    predictions = [rng.choice(predicted_of, truth.shape) for truth in truths]

    total = torch.zeros(classes, classes, dtype=torch.int64)
    for truth, prediction in zip(truths, predictions, strict=True):
        total += confusion_matrix(torch.from_numpy(truth), torch.from_numpy(prediction), classes)
    scores = segmentation_scores(total)

    y, p = (np.concatenate([x.ravel() for x in maps]) for maps in (truths, predictions))
    y, p = y[y != VOID], p[y != VOID]
    present = np.union1d(y, p)
    np.testing.assert_array_equal(total, sklearn_confusion(y, p, labels=range(classes)))
    by_class = jaccard_score(y, p, labels=range(classes), average=None, zero_division=0)
    assert scores.pixel_accuracy == pytest.approx(accuracy_score(y, p))
    assert scores.miou == pytest.approx(jaccard_score(y, p, labels=present, average="macro"))
    for label, iou in enumerate(scores.iou):
        assert iou == pytest.approx(by_class[label]) if label in present else np.isnan(iou)
    assert 0 <= scores.miou <= 1


def test_class_that_is_only_predicted_counts_as_zero_and_one_that_is_nowhere_is_left_out() -> None:
    """Three pixels of class 0, one of them predicted as class 1; class 2 is nowhere but on a void pixel."""
    truth = torch.tensor([[0, 0, 0, VOID]], dtype=torch.uint8)
    scores = segmentation_scores(confusion_matrix(truth, torch.tensor([[0, 0, 1, 2]]), 3))
    assert scores.iou[:2] == pytest.approx([2 / 3, 0])
    assert np.isnan(scores.iou[2])
    assert scores.miou == pytest.approx(1 / 3)
    assert scores.pixel_accuracy == pytest.approx(2 / 3)


def test_nothing_but_void_has_no_score() -> None:
    truth = torch.full((3, 3), VOID)
    with pytest.raises(ValueError, match="every mask is void"):
        segmentation_scores(confusion_matrix(truth, torch.zeros(3, 3, dtype=torch.long), 2))


def test_maps_that_cannot_be_compared_are_refused() -> None:
    labels = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="sizes must be equal"):
        confusion_matrix(labels, torch.zeros(2, 3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="predictions are 0 to 2, with 2 classes"):
        confusion_matrix(labels, torch.tensor([[0, 1], [2, 0]]), 2)


# Boxes ----------------------------------------------------------------------------------------------------------------


def test_corloc_by_hand() -> None:
    """10 x 10 against its left half is exactly 0.5, against four columns 0.4; the second of two boxes may be the one;
    an image without boxes is left out."""
    box = np.array([[0, 0, 10, 10]] * 5, float)
    truth = [[[0, 0, 5, 10]], [[0, 0, 4, 10]], [[20, 20, 30, 30], [1, 0, 11, 10]], [], [[10, 0, 20, 10]]]
    hits = corloc(box, [np.array(boxes, float).reshape(-1, 4) for boxes in truth])
    assert hits.dtype == bool
    assert hits.tolist() == [True, False, True, False]
    assert corloc(np.zeros((1, 4)), [np.zeros((0, 4))]).shape == (0,)
    assert corloc(np.zeros((1, 4)), [np.zeros((1, 4))]).tolist() == [False]


def pixels(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}


a_box = st.tuples(st.integers(0, 6), st.integers(0, 6), st.integers(1, 6), st.integers(1, 6)).map(
    lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
)


@given(st.lists(st.tuples(a_box, st.lists(a_box, max_size=3)), min_size=1, max_size=5))
@settings(max_examples=100)
def test_corloc_is_that_of_counted_pixels(images: list[tuple[Any, list[Any]]]) -> None:
    expected = []
    for box, truth in images:
        ious = [Fraction(len(pixels(box) & pixels(one)), len(pixels(box) | pixels(one))) for one in truth]
        if truth:
            expected.append(any(iou >= Fraction(1, 2) for iou in ious))
            np.testing.assert_allclose(box_iou(np.array(box), np.array(truth)), [float(iou) for iou in ious])
    boxes = np.array([box for box, _ in images], float)
    assert corloc(boxes, [np.array(truth, float).reshape(-1, 4) for _, truth in images]).tolist() == expected


@pytest.mark.parametrize(("count", "share"), [(300, 0.62), (40, 0.9)])
def test_bootstrap_is_scipys(count: int, share: float) -> None:
    hits = np.arange(count) < round(share * count)
    scipys = scipy.stats.bootstrap(
        (hits.astype(float),), np.mean, n_resamples=10000, method="percentile", rng=np.random.default_rng(1)
    )
    # One image more or less, where the quantile lies between two shares.
    np.testing.assert_allclose(bootstrap_interval(hits), scipys.confidence_interval, atol=1.01 / count)
    assert bootstrap_interval(hits, 3) == bootstrap_interval(hits, 3)
    many = {bootstrap_interval(hits, seed) for seed in range(20)}
    assert count == 40 or len(many) > 1
    assert bootstrap_interval(np.ones(9, bool)) == (1, 1)


# Windows --------------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_out_of_range_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride is {stride} and window 8"):
        windows(20, 20, 8, stride)


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


# Resizing of logits ---------------------------------------------------------------------------------------------------


def test_logits_are_resized_bilinearly_with_half_pixel_centres() -> None:
    """From 2 to 4, the centres of the new pixels lie at -1/4 (clamped to 0), 1/4, 3/4 and 5/4 (clamped to 1)."""
    corners = torch.tensor([[0.0, 4.0], [8.0, 16.0]])
    expected = [[0, 1, 3, 4], [2, 3.25, 5.75, 7], [6, 7.75, 11.25, 13], [8, 10, 14, 16]]
    np.testing.assert_allclose(resize_logits(corners[None, None], (4, 4))[0, 0], expected)
