"""Metrics of predictions: mIoU of label maps, CorLoc of boxes, J and F of videos, bootstrap intervals."""

from typing import NamedTuple

import cv2
import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor


class SegmentationScores(NamedTuple):
    """Of a whole data set, in [0, 1]."""

    miou: float
    """Mean of `iou` over the classes that occur in the truth or in the prediction."""
    iou: list[float]
    """Of each class; NaN for one that occurs in neither."""
    pixel_accuracy: float


def pixel_pairs(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns), counted on the device without waiting for it.

    Args:
        truth, prediction: integers of any shape, the same.

    Returns:
        int64 [classes + 1, classes + 1], of which the last row and column are of what is not in 0..classes - 1.

    Raises:
        ValueError: shapes that differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {list(truth.shape)} and prediction {list(prediction.shape)}; sizes must be equal")
    y, p = (torch.where((x >= 0) & (x < classes), x.long(), classes) for x in (truth, prediction))
    pairs = (y * (classes + 1) + p).flatten()
    counts = pairs.new_zeros((classes + 1) ** 2).scatter_add_(0, pairs, torch.ones_like(pairs))
    return counts.view(classes + 1, classes + 1)


def known_pairs(pairs: Tensor) -> Tensor:
    """Confusion matrices [..., C, C] from `pixel_pairs` [..., C + 1, C + 1] and their sums.

    Raises:
        ValueError: a prediction that is no class. It is here that the host waits for the device.
    """
    outside = pairs[..., -1]
    if not (outside == 0).all():
        raise ValueError(f"pixels predicted to be of no class of 0 to {pairs.shape[-1] - 2}: {int(outside.sum()):,}")
    return pairs[..., :-1, :-1]


def confusion_matrix(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Pixels by true class (rows) and predicted class (columns).

    Args:
        truth: integers of any shape. Values outside of 0..classes - 1, such as VOID, are left out.
        prediction: integers in 0..classes - 1, of the same shape.

    Returns:
        int64 [classes, classes] on the device of `truth`. Matrices of images add up to that of the data set.

    Raises:
        ValueError: shapes that differ, or a prediction that is no class.
    """
    return known_pairs(pixel_pairs(truth, prediction, classes))


def segmentation_scores(confusion: Tensor) -> SegmentationScores:
    """mIoU, IoU of each class and pixel accuracy from a confusion matrix [C, C] that was summed over a data set.

    A class that occurs in neither truth nor prediction has no IoU and is left out of the mean, as in mmsegmentation;
    one that is predicted and never true counts as 0.

    Raises:
        ValueError: no pixel was counted.
    """
    confusion = confusion.double().cpu()
    if confusion.sum() == 0:
        raise ValueError("no pixel has a label to compare with: every mask that is scored is void")
    hits = confusion.diag()
    iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)
    return SegmentationScores(float(iou.nanmean()), iou.tolist(), float(hits.sum() / confusion.sum()))


def image_counts(confusion: Tensor) -> Tensor:
    """What mIoU needs of a confusion matrix [C, C]: int64 [3, C], pixels of each class that are right, true and
    predicted. Small enough to be kept for every image."""
    return torch.stack([confusion.diag(), confusion.sum(1), confusion.sum(0)])


def miou_interval(counts: np.ndarray, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a data set's mIoU, its images drawn with replacement.

    Args:
        counts: [N, 3, C], `image_counts` of every image.

    Returns:
        Lower and upper end, in [0, 1]. mIoU is not a mean over images, and rare classes can be missing from a draw, so
        the interval need not lie symmetrically around the figure.
    """
    low, high = np.percentile(_drawn_miou(counts, seed, resamples), [2.5, 97.5])
    return float(low), float(high)


def miou_drop_interval(
    before: np.ndarray, after: np.ndarray, seed: int = 0, resamples: int = 1000
) -> tuple[float, float]:
    """Likewise of the mIoU of `before` minus that of `after`, both [N, 3, C] of the same images: pairs are drawn."""
    drops = _drawn_miou(before, seed, resamples) - _drawn_miou(after, seed, resamples)
    low, high = np.percentile(drops, [2.5, 97.5])
    return float(low), float(high)


def _drawn_miou(counts: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """mIoU of every resample; for a seed and a number of images, the same images are drawn."""
    n, _, classes = counts.shape
    rng = np.random.default_rng(seed)
    flat = counts.reshape(n, -1).astype(np.float64)
    miou = []
    for first in range(0, resamples, 100):
        drawn = rng.multinomial(n, np.full(n, 1 / n), min(100, resamples - first)) @ flat
        right, true, predicted = drawn.reshape(-1, 3, classes).transpose(1, 0, 2)
        union = true + predicted - right
        # A class that a draw lacks has no IoU there, as in `segmentation_scores`.
        iou = np.divide(right, union, out=np.zeros_like(right), where=union > 0)
        miou.append(iou.sum(1) / np.maximum((union > 0).sum(1), 1))
    return np.concatenate(miou)


def box_iou(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU of a box [4] with others [n, 4], each x0, y0, x1, y1 in half-open pixels. Returns float64 [n]."""
    corner = np.maximum(box[:2], others[:, :2])
    sides = (np.minimum(box[2:], others[:, 2:]) - corner).clip(min=0)
    intersection = sides[:, 0] * sides[:, 1]
    area = (box[2] - box[0]) * (box[3] - box[1])
    areas = (others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1])
    return intersection / np.maximum(area + areas - intersection, 1e-12)


def corloc(boxes: np.ndarray, truth: list[np.ndarray]) -> np.ndarray:
    """Whether the one box of each image meets an object: IoU of at least 0.5 with any true box (LOST, section 4.1).

    Args:
        boxes: [N, 4].
        truth: N arrays [n, 4]; an image without a true box is left out.

    Returns:
        bool [images with a true box]. Their mean is CorLoc.
    """
    pairs = [(box, true_boxes) for box, true_boxes in zip(boxes, truth, strict=True) if len(true_boxes)]
    return np.array([box_iou(box, true_boxes).max() >= 0.5 for box, true_boxes in pairs], bool)


def region_similarity(found: np.ndarray, truth: np.ndarray) -> float:
    """J of DAVIS: IoU of two masks, bool [H, W]; 1 where both are empty."""
    union = (found | truth).sum()
    return float((found & truth).sum() / union) if union else 1.0


def boundary_map(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask, bool [H, W], that differ from the one at the right, below, or right below: bool [H, W]."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])


def boundary_accuracy(found: np.ndarray, truth: np.ndarray, tolerance: float = 0.008) -> float:
    """F of DAVIS (Perazzi et al., 2016; the code of the DAVIS 2017 evaluation): the F-measure of the boundaries of two
    masks, bool [H, W]. A pixel of one is right where the other's has one within `tolerance` times the diagonal, rounded
    up. 1 where neither has a boundary, 0 where one has."""
    radius = int(np.ceil(tolerance * np.hypot(*found.shape)))
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.uint8)
    edges = [boundary_map(mask) for mask in (found, truth)]
    if not all(edge.any() for edge in edges):
        return float(not any(edge.any() for edge in edges))
    near_found, near_truth = (cv2.dilate(edge.astype(np.uint8), disk) > 0 for edge in edges)
    precision, recall = near_truth[edges[0]].mean(), near_found[edges[1]].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


class VideoScores(NamedTuple):
    """Of an object over the frames of a video."""

    mean: float
    recall: float
    """Share of the frames above 0.5."""
    decay: float
    """Mean of the first quarter of the frames less that of the last; quarters share the frames between them."""


def video_scores(values: np.ndarray) -> VideoScores:
    """Of J or F [frames], as the DAVIS 2017 evaluation sums them up."""
    ends = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    return VideoScores(float(values.mean()), float((values > 0.5).mean()), float(first.mean() - last.mean()))


def bootstrap_interval(hits: np.ndarray, seed: int = 0, resamples: int = 10000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of hits, bool [N].

    The mean of N images drawn with replacement is a binomial share, which is drawn directly.
    """
    shares = np.random.default_rng(seed).binomial(len(hits), hits.mean(), resamples) / len(hits)
    low, high = np.percentile(shares, [2.5, 97.5])
    return float(low), float(high)


def mean_interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap interval of a mean over images, float [N]."""
    if len(values) < 2 or np.ptp(values) == 0:
        return float(values.mean()), float(values.mean())
    drawn = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=seed).confidence_interval
    return float(drawn.low), float(drawn.high)


def drop_interval(before: np.ndarray, after: np.ndarray, seed: int = 0, resamples: int = 10000) -> tuple[float, float]:
    """Likewise of the mean of `before` minus that of `after`, bool [N] both, of the same images: pairs are drawn."""
    change = before.astype(int) - after.astype(int)
    shares = [(change == value).mean() for value in (1, -1, 0)]
    drawn = np.random.default_rng(seed).multinomial(len(change), shares, resamples)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / len(change), [2.5, 97.5])
    return float(low), float(high)
