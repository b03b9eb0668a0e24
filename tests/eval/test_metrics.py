"""Scores of segmentations against scikit-learn, CorLoc by counted pixels, the bootstrap against SciPy."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from skipless.datasets.labels.masks import VOID
from skipless.eval.metrics import bootstrap_interval, box_iou, confusion_matrix, corloc, segmentation_scores


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
    with pytest.raises(ValueError, match="every mask that is scored is void"):
        segmentation_scores(confusion_matrix(truth, torch.zeros(3, 3, dtype=torch.long), 2))


def test_maps_that_cannot_be_compared_are_refused() -> None:
    labels = torch.zeros(2, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="sizes must be equal"):
        confusion_matrix(labels, torch.zeros(2, 3, dtype=torch.long), 2)
    with pytest.raises(ValueError, match="no class of 0 to 1: 1"):
        confusion_matrix(labels, torch.tensor([[0, 1], [2, 0]]), 2)


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
