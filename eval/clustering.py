"""Unsupervised segmentation: k-means over patch features, its clusters named by the classes they fit best.

    python eval/clustering.py --ckpt dino_deitsmall16_pretrain.pth --data.name voc12 --data.root VOCdevkit --out voc
    python eval/clustering.py --clusters 500 --ckpt runs/photos --data.name coco-stuff-27 --data.root coco

Labels are used for naming clusters and for scoring, not for the features or for k-means. The figure's id names the
number of clusters K: voc12-clustering/kmeans-21. It is the mean over five runs of k-means, whose seeds are --seed and
the numbers after it.

Source: Leopart (arXiv 2204.13101) and NeCo (arXiv 2408.11054), as their public code measures it (MkuuWaUjinga/leopart
and vpariza/NeCo, overclustering):
- Squares of 448 pixels; patch tokens of the evaluated images. They are not brought to length 1: each channel is
  standardized over all patches, and PCA keeps 50 components, not whitened.
- faiss's k-means, Euclidean, 100 iterations, the best of 5 starts, on 256 patches for each cluster, drawn at random by
  faiss (all patches, where there are fewer). Then every patch goes to its nearest centroid.
- Clusters and labels are compared on 100 x 100 points an image, each with the label of the pixel and the cluster of the
  patch it lies in. Void is not scored.
- As many clusters as classes: one to one, such that the sum of IoU is largest (Hungarian). More clusters: each goes to
  the class that has most of its points, and those of a class are one region.
What differs here: mIoU leaves out a class that occurs in neither truth nor prediction, which they count as 0; their
points are the corners of the cells of the 100 x 100 grid, ours the centers; PCA is computed from all patches.

The same seed gives the same bits on the same machine. Under torchrun the runs of k-means are dealt out to the
processes. An interrupted run is continued by the same command, which finds the features in the cache.
"""

import skipless.common.interruption  # noqa: F401

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from skipless.common import cli
from skipless.common.distributed import gather_objects, rank, world_size
from skipless.common.progress import Progress
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.dense.data import SplitSettings, described, open_split, square_features
from skipless.eval.dense.report import choose_shown, finish_segmentation, protocol_id
from skipless.eval.evaluation import FeatureSettings, SheetSettings, announce, prepare
from skipless.eval.features import Features
from skipless.eval.metrics import segmentation_scores
from skipless.eval.neighbors import require_faiss
from skipless.eval.reading import read_batches

COMPONENTS = 50
POINTS = 100  # in a column and in a row of an image
CHUNK = 16  # images whose features are read at a time


@dataclass
class Settings(SheetSettings, FeatureSettings):
    """Unsupervised segmentation."""

    data: SplitSettings
    clusters: int | None = None
    """Clusters; by default as many as classes, and never fewer."""
    seeds: int = 5
    """Runs of k-means. The figure is their mean."""
    size: int = 448
    """Side in pixels of the squares that images are resized to. For a patch that does not divide it, the multiple of
    the patch below it is used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.size, self.seeds) < 1:
            raise ValueError("size and seeds must be 1 or more")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure unsupervised segmentation as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used, or no faiss.
    """
    require_faiss()
    context = prepare(settings, "clustering")
    val = open_split(settings.data, settings.data.split)
    classes, patch = len(val.classes), context.backbone.patch
    clusters = classes if settings.clusters is None else settings.clusters
    if clusters < classes:
        raise ValueError(f"clusters is {clusters}, fewer than the {classes} classes of {val.name}; give more")
    size = context.backbone.multiple_below(settings.size)
    if clusters > (count := len(val) * (size // patch) ** 2):
        raise ValueError(f"clusters is {clusters}, and {val.name} {val.split} has {count:,} patches of {size} pixels")
    changed = {} if settings.size == Settings.size else {"size": [Settings.size, settings.size]}
    protocol = protocol_id(context, f"{val.name}-clustering/kmeans-{clusters}", bool(changed))
    announce(context, protocol, described(val))

    features = square_features(context, val, size)
    labels, shown = sample_labels(val, context.workers), choose_shown(val)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    scores = []  # [choice][seed]
    for choice in context.choices:
        x = standardized_components(features, choice)
        mine = {}
        for seed in Progress(seeds[rank() :: world_size()], desc="k-means", unit="run", active=rank() == 0):
            assigned = kmeans(x, clusters, seed).reshape(-1, *features.grid)  # [N, h, w]
            confusion = cluster_confusion(labels, sample_grid(assigned), classes, clusters)
            class_of = match_clusters(confusion)
            score = segmentation_scores(torch.from_numpy(merge_clusters(confusion, class_of)))
            mine[seed] = score, {image: class_of[assigned[image]].astype(np.uint8) for image in shown}
        runs = {seed: run for part in gather_objects(mine) for seed, run in part.items()}
        scores.append([runs[seed][0] for seed in seeds])
        predictions = runs[seeds[0]][1]
    means = [_mean([s.miou for s in run_scores], [s.pixel_accuracy for s in run_scores]) for run_scores in scores]
    iou = np.array([s.iou for s in scores[-1]])
    details: dict[str, Any] = {
        "blocks": [block + 1 for block in context.choices[-1]],
        "pixel_accuracy": means[-1]["pixel_accuracy"],
        "iou": {
            name: None if np.isnan(column).all() else float(np.nanmean(column))
            for name, column in zip(val.classes, iou.T, strict=True)
        },
        "clusters": clusters,
        "matching": "one to one" if clusters == classes else "many to one",
        "image_size": size,
        "std": means[-1]["std"],
        "runs": [
            {"seed": seed, "miou": s.miou, "pixel_accuracy": s.pixel_accuracy}
            for seed, s in zip(seeds, scores[-1], strict=True)
        ],
        "changed_settings": changed,
    }
    if settings.every_block:
        details["every_block"] = [
            {"block": choice[0] + 1, **mean} for choice, mean in zip(context.choices, means, strict=True)
        ]
    miou = means[-1]["miou"]
    return finish_segmentation(context, protocol, val, miou, details, predictions, how(details), "published")


def standardized_components(features: Features, blocks: Sequence[int]) -> np.ndarray:
    """Patch features, each channel at mean 0 and standard deviation 1 over all patches, in their first principal
    components (50, or all channels where there are fewer), float32 [N * h * w, 50]."""
    chunks = np.array_split(np.arange(features.images), -(-features.images // CHUNK))

    def read(images: np.ndarray) -> np.ndarray:
        return features.read(images, blocks).flatten(0, 2).numpy().astype(np.float64)

    count = features.images * features.grid[0] * features.grid[1]
    mean = sum(read(images).sum(0) for images in chunks) / count
    covariance = np.asarray(sum((x := read(images) - mean).T @ x for images in chunks)) / count
    # The floor keeps a channel that never changes from being blown up.
    std = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    _, vectors = np.linalg.eigh(covariance / std[:, None] / std)
    projection = vectors[:, ::-1][:, :COMPONENTS] / std[:, None]
    return np.concatenate([((read(images) - mean) @ projection).astype(np.float32) for images in chunks])


def kmeans(x: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """The cluster of each vector, int64 [P], by the k-means that is described at the top of this file.

    Args:
        x: float32 [P, D], P >= clusters.
    """
    faiss = require_faiss()
    trained = faiss.Kmeans(x.shape[1], clusters, niter=100, nredo=5, seed=seed, min_points_per_centroid=1)
    trained.train(x)
    return trained.assign(x)[1]


def sample_grid(grid: np.ndarray, points: int = POINTS) -> np.ndarray:
    """[..., H, W] -> [..., points, points]: what lies at the centers of the cells of a points x points grid."""
    rows, columns = ((2 * np.arange(points) + 1) * side // (2 * points) for side in grid.shape[-2:])
    return grid[..., rows[:, None], columns]


def cluster_confusion(labels: np.ndarray, assigned: np.ndarray, classes: int, clusters: int) -> np.ndarray:
    """Points by class (rows) and cluster (columns), int64 [classes, clusters].

    Args:
        labels: uint8 of any shape; values from `classes` on, such as VOID, are left out.
        assigned: integers in 0..clusters - 1, of the same shape.
    """
    confusion = np.zeros(classes * clusters, np.int64)
    for truth, cluster in zip(labels, assigned, strict=True):
        counted = truth < classes
        pairs = truth[counted].astype(np.int64) * clusters + cluster[counted]
        confusion += np.bincount(pairs, minlength=classes * clusters)
    return confusion.reshape(classes, clusters)


def match_clusters(confusion: np.ndarray) -> np.ndarray:
    """The class of each cluster, int64 [K].

    As many clusters as classes are matched one to one, such that the sum of IoU is largest. Of more clusters, each goes
    to the class that has most of its points, the first of several that have equally many (Leopart's precision-based
    matching).

    Args:
        confusion: int64 [C, K], points by class and cluster; K >= C.
    """
    classes, clusters = confusion.shape
    if clusters > classes:
        return confusion.argmax(0)
    union = confusion.sum(0) + confusion.sum(1, keepdims=True) - confusion
    return linear_sum_assignment((confusion / np.maximum(union, 1)).T, maximize=True)[1]


def merge_clusters(confusion: np.ndarray, class_of: np.ndarray) -> np.ndarray:
    """Points by class and predicted class, int64 [C, C], from those by class and cluster, int64 [C, K]."""
    merged = np.zeros((len(confusion), len(confusion)), np.int64)
    np.add.at(merged.T, class_of, confusion.T)
    return merged


def sample_labels(images: SegmentationSet, workers: int) -> np.ndarray:
    """The labels that are scored, uint8 [N, 100, 100]. Raises ValueError for an unreadable mask."""
    batches = Progress([[index] for index in range(len(images))], desc="labels", unit="image", active=rank() == 0)
    return np.stack([points for (points,) in read_batches(partial(_points, images), batches, workers)])


def _points(images: SegmentationSet, index: int) -> np.ndarray:
    return sample_grid(images.read_matched_mask(index))


def _mean(miou: Sequence[float], accuracy: Sequence[float]) -> dict[str, Any]:
    """Means over runs, and the standard deviation (of a sample) of mIoU, None for a single run."""
    std = float(np.std(miou, ddof=1)) if len(miou) > 1 else None
    return {"miou": float(np.mean(miou)), "std": std, "pixel_accuracy": float(np.mean(accuracy))}


def how(details: dict[str, Any]) -> str:
    """What was done, for the report."""
    runs = ", ".join(f"{100 * entry['miou']:.1f}" for entry in details["runs"])
    return (
        f"{details['clusters']} clusters, matched {details['matching']}; {len(details['runs'])} runs of k-means: {runs}"
    )


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
