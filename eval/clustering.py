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

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.common.distributed import gather_objects, rank, world_size
from skipless.common.files import write_result
from skipless.common.settings import plain
from skipless.datasets.labels.counts import COUNTS, describe_split
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.backbones import Precision, Weights, choose_blocks, load_backbone, untrained
from skipless.eval.dense.data import DATA, image_of_pair
from skipless.eval.dense.report import PICTURES, draw, report
from skipless.eval.evaluation import keep_other_result, result_of
from skipless.eval.features import Features, default_cache, extract
from skipless.eval.metrics import segmentation_scores
from skipless.eval.neighbors import require_faiss
from skipless.ssl.data.loader import leave_signals_to_main, loader_workers

COMPONENTS = 50
POINTS = 100  # in a column and in a row of an image
CHUNK = 16  # images whose features are read at a time


@dataclass
class ClusteredData:
    """What is segmented."""

    name: Literal["voc12", "coco-stuff-27", "coco-stuff-171", "ade20k", "scenes"]
    """Data set: PASCAL VOC 2012 (21 classes), COCO-Stuff (27 coarse or 171 classes), ADE20K (150), or the scenes that
    datasets/scenes.py writes."""
    root: str
    """Its folder, laid out as its authors ship it: VOCdevkit, COCO's, ADEChallengeData2016, or the scenes' folder."""
    split: str = "val"
    """Split that is clustered."""


@dataclass
class Settings:
    """Unsupervised segmentation."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    data: ClusteredData
    clusters: int | None = None
    """Clusters; by default as many as classes, and never fewer."""
    seeds: int = 5
    """Runs of k-means. The figure is their mean."""
    size: int = 448
    """Side in pixels of the squares that images are resized to. For a patch that does not divide it, the multiple of
    the patch below it is used."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    blocks: str = "last"
    """Blocks whose patch features are concatenated: last, last4, or numbers from 1, as in 3,6,9,12. Named in the
    figure's id where they are not the last."""
    every_block: bool = False
    """Cluster each block by itself, and report mIoU block by block."""
    out: str | None = None
    """Folder for clustering.json, clustering.md and pictures.png; by default nothing is written."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""
    seed: int = 0
    """Of the first run of k-means (and of random weights)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. k-means itself runs on the CPU."""
    precision: Precision = "fp32"
    """In which the network computes features: fp32, or bf16 where the device is fast in it. bf16 saves time on a GPU;
    a model without skips feels the rounding. The figure's id then ends in /bf16."""
    batch_size: int = 16
    """Images in one forward pass of the backbone. Changes speed and memory alone."""
    workers: int | None = None
    """Processes that read images; by default all cores shared out with a GPU, and none on a CPU, which needs them
    itself."""

    def __post_init__(self) -> None:
        if min(self.size, self.seeds, self.batch_size) < 1 or min(self.workers or 0, self.seed) < 0:
            raise ValueError("size, seeds and batch-size must be 1 or more, workers and seed 0 or more")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure unsupervised segmentation as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used, or no faiss.
    """
    device = distributed.start(settings.device)
    began = time.perf_counter()
    require_faiss()
    backbone = load_backbone(settings.ckpt, settings.weights)
    if settings.untrained:
        backbone = untrained(backbone, settings.seed)
    backbone = backbone.to(device, settings.precision)
    workers = loader_workers(settings.workers, device)
    choices = choose_blocks(settings.blocks, settings.every_block, backbone)
    data = settings.data
    val = DATA[data.name](data.root, data.split)
    classes = len(val.classes)
    clusters = classes if settings.clusters is None else settings.clusters
    if clusters < classes:
        raise ValueError(f"clusters is {clusters}, fewer than the {classes} classes of {data.name}; give more")
    size = max(settings.size // backbone.patch, 1) * backbone.patch
    if clusters > (count := len(val) * (size // backbone.patch) ** 2):
        raise ValueError(f"clusters is {clusters}, and {val.name} {val.split} has {count:,} patches of {size} pixels")
    default = Settings.size
    changed = {} if settings.size == default else {"size": [default, settings.size]}
    protocol = f"{data.name}-clustering/kmeans-{clusters}"
    if not settings.every_block and settings.blocks != "last":
        protocol += "/blocks-" + "-".join(str(block + 1) for block in choices[-1])
    protocol += " (changed)" if changed else ""
    recorded = plain(settings) | {"precision": backbone.precision}
    out = Path(settings.out) if settings.out else None
    if out:
        keep_other_result(out / "clustering.json", recorded)
    first = rank() == 0
    if first:
        on = f"on {device}, {backbone.described_precision}"
        print(f"{protocol}: {backbone.architecture} ({backbone.path}) {on}", flush=True)
        print(describe_split(data.name, val.split, len(val)), flush=True)
        if out:
            out.mkdir(parents=True, exist_ok=True)

    cache = Path(settings.cache).expanduser() if settings.cache else default_cache()
    blocks = sorted({block for choice in choices for block in choice})
    features = extract(
        backbone, val.images, partial(image_of_pair, val), size, blocks, cache, "tokens",
        settings.batch_size, workers, f"features, {val.split}",
    )  # fmt: skip
    labels = sample_labels(val, workers)
    shown = np.linspace(0, len(val) - 1, min(PICTURES, len(val))).round().astype(int).tolist()
    seeds = range(settings.seed, settings.seed + settings.seeds)
    runs = []  # [choice][seed] -> scores
    for choice in choices:
        x = standardized_components(features, choice)
        mine = {}
        for seed in tqdm(seeds[rank() :: world_size()], desc="k-means", unit="run", disable=rank() > 0):
            of_patch = kmeans(x, clusters, seed).reshape(-1, *features.grid)
            confusion = cluster_confusion(labels, sample_grid(of_patch), classes, clusters)
            class_of = match_clusters(confusion)
            scores = segmentation_scores(torch.from_numpy(merge_clusters(confusion, class_of)))
            mine[seed] = scores, {i: class_of[of_patch[i]].astype(np.uint8) for i in shown}
        found = {seed: run for part in gather_objects(mine) for seed, run in part.items()}
        runs.append([found[seed][0] for seed in seeds])
        predictions = found[seeds[0]][1]
    main = runs[-1]
    figures = [_summary([s.miou for s in scores], [s.pixel_accuracy for s in scores]) for scores in runs]
    iou = np.array([scores.iou for scores in main])
    details: dict[str, Any] = {
        "blocks": [block + 1 for block in choices[-1]],
        "pixel_accuracy": figures[-1]["pixel_accuracy"],
        "iou": {
            name: None if np.isnan(column).all() else float(np.nanmean(column))
            for name, column in zip(val.classes, iou.T, strict=True)
        },
        "clusters": clusters,
        "matching": "one to one" if clusters == classes else "many to one",
        "image_size": size,
        "std": figures[-1]["std"],
        "runs": [
            {"seed": seed, "miou": s.miou, "pixel_accuracy": s.pixel_accuracy}
            for seed, s in zip(seeds, main, strict=True)
        ],
        "changed_settings": changed,
    }
    if settings.every_block:
        details["every_block"] = [
            {"block": choice[0] + 1, **figure} for choice, figure in zip(choices, figures, strict=True)
        ]
    result = result_of(
        "clustering", protocol, val.name, val.split, len(val), "mIoU", figures[-1]["miou"], details, backbone, recorded,
        settings.seed, time.perf_counter() - began, device, COUNTS.get((val.name, val.split)),
    )  # fmt: skip
    if first:
        text = report(result, how(details), "published")
        if out:
            draw(val, predictions, out / "pictures.png")
            write_result(out / "clustering", result, text)
        print("\n" + text, end="")
        if out:
            print(f"\nwritten: {out / 'clustering.json'}, clustering.md, pictures.png")
    return result


def standardized_components(features: Features, blocks: Sequence[int]) -> np.ndarray:
    """Patch features, each channel at mean 0 and standard deviation 1 over all patches, in their first principal
    components (50, or all channels where there are fewer), float32 [N * h * w, 50]."""
    rows = np.array_split(np.arange(features.images), -(-features.images // CHUNK))

    def read(some: np.ndarray) -> np.ndarray:
        return features.read(some, blocks).flatten(0, 2).numpy().astype(np.float64)

    count = features.images * features.grid[0] * features.grid[1]
    mean = sum(read(some).sum(0) for some in rows) / count
    covariance = np.asarray(sum((x := read(some) - mean).T @ x for some in rows)) / count
    # The floor keeps a channel that never changes from being blown up.
    std = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    _, vectors = np.linalg.eigh(covariance / std[:, None] / std)
    projection = vectors[:, ::-1][:, :COMPONENTS] / std[:, None]
    return np.concatenate([((read(some) - mean) @ projection).astype(np.float32) for some in rows])


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


def cluster_confusion(labels: np.ndarray, found: np.ndarray, classes: int, clusters: int) -> np.ndarray:
    """Points by class (rows) and cluster (columns), int64 [classes, clusters].

    Args:
        labels: uint8 of any shape; values from `classes` on, such as VOID, are left out.
        found: integers in 0..clusters - 1, of the same shape.
    """
    confusion = np.zeros(classes * clusters, np.int64)
    for truth, of_image in zip(labels, found, strict=True):
        counted = truth < classes
        pairs = truth[counted].astype(np.int64) * clusters + of_image[counted]
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
    matched, of_cluster = linear_sum_assignment((confusion / np.maximum(union, 1)).T, maximize=True)
    class_of = np.empty(clusters, np.int64)
    class_of[matched] = of_cluster
    return class_of


def merge_clusters(confusion: np.ndarray, class_of: np.ndarray) -> np.ndarray:
    """Points by class and predicted class, int64 [C, C], from those by class and cluster, int64 [C, K]."""
    merged = np.zeros((len(confusion), len(confusion)), np.int64)
    np.add.at(merged.T, class_of, confusion.T)
    return merged


def sample_labels(images: SegmentationSet, workers: int) -> np.ndarray:
    """The labels that are scored, uint8 [N, 100, 100]. Raises ValueError for an unreadable mask."""
    loader = DataLoader(
        _Points(images), batch_size=None, num_workers=workers, collate_fn=None, worker_init_fn=leave_signals_to_main
    )
    labels = np.empty((len(images), POINTS, POINTS), np.uint8)
    for index, found in enumerate(tqdm(loader, desc="labels", unit="image", disable=rank() > 0)):
        if isinstance(found, str):
            raise ValueError(found)
        labels[index] = found
    return labels


class _Points(Dataset):
    """uint8 [100, 100] for each image: its labels. For an unreadable mask, the sentence that says so: an exception
    would reach the main process without its type."""

    def __init__(self, images: SegmentationSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor | str:
        try:
            return torch.from_numpy(sample_grid(self.images.read_matched_mask(index)))
        except (ValueError, OSError) as error:
            return str(error)


def _summary(miou: Sequence[float], accuracy: Sequence[float]) -> dict[str, Any]:
    """Means over runs, and the standard deviation (of a sample) of mIoU, None for a single run."""
    std = float(np.std(miou, ddof=1)) if len(miou) > 1 else None
    return {"miou": float(np.mean(miou)), "std": std, "pixel_accuracy": float(np.mean(accuracy))}


def how(details: dict[str, Any]) -> str:
    """What was done, for the report."""
    runs = ", ".join(f"{100 * entry['miou']:.1f}" for entry in details["runs"])
    return (
        f"{details['clusters']} clusters, matched {details['matching']}; {len(details['runs'])} runs of k-means: {runs}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(evaluate, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
