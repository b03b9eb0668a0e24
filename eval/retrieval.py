"""In-context segmentation: patches are labeled by their nearest neighbors in a memory of labeled patches.

    python eval/retrieval.py --ckpt dino_deitsmall16_pretrain.pth --data.name voc12 --data.root VOCdevkit --out voc

    python eval/retrieval.py --ckpt runs/photos --data.name voc12 --data.root VOCdevkit --share 128 --seeds 5 --out few

Nothing is trained. The memory holds patch features of the training images, each with the share of every class in its
patch. A patch of an evaluated image attends to its 30 nearest neighbors by cosine, weighted by a softmax of
similarity / 0.02, and gets the weighted mean of their shares. The map of shares is resized bilinearly to the original
label, and every pixel counts. A full memory is for a GPU; on a CPU, --size 224 --index ivf gives a figure for comparing
checkpoints with each other.

Source: I. Balazevic et al., "Towards In-context Scene Understanding" (arXiv 2306.01667), as its public reproduction
vpariza/open-hummingbird-eval measures it: a memory of 10.24 M patches, of VOC's trainaug. Where the training images
have more patches, each gives equally many, and those of an image's rare classes are preferred: a patch scores u times
the sum, over its classes, of the number of the image's patches that hold the class, u uniform in [0, 1), and the lowest
scores are taken. What differs here:
- Each training image is used once and whole; theirs fill the memory in two passes of random crops with color jitter.
- Void is left out: a patch has the shares of its labeled pixels, and without any it is not in the memory. There, void
  counts as class 0 in the memory, which on VOC is the background. Neither scores void pixels.
- mIoU is that of the original labels, theirs that of labels resized to the square of the images; and they match
  predicted to true classes anew, one to one, before they score.
- Images are normalized with the backbone's own constants; theirs have 0.255 where ImageNet's blue has 0.225. They are
  resized bicubically, not bilinearly.
- Their search is ScaNN's, which is approximate, or exact, depending on the release; ours is named in the result.

- With --share 128 (few-shot), theirs are fixed lists of about one image of 128, five of each (80 of VOC's 10,582, 150
  of ADE20K's 20,210); ours are drawn by the seed, and have 82 and 157.

Under torchrun every process holds the whole memory, and the evaluated images are dealt out. An interrupted run is
continued by the same command, which finds the features in the cache.
"""

import skipless.common.interruption  # noqa: F401

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from skipless.common import cli
from skipless.common.distributed import rank, world_size
from skipless.common.memory import host_memory
from skipless.common.progress import Progress
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.dense.data import DataSettings, described, open_split, square_features
from skipless.eval.dense.labels import predict, read_label_shares
from skipless.eval.dense.outcome import Figures, Outcome, Tally, figures
from skipless.eval.dense.report import choose_shown, finish_segmentation, protocol_id
from skipless.eval.evaluation import Context, FeatureSettings, SheetSettings, announce, prepare
from skipless.eval.features import Features
from skipless.eval.neighbors import find_faiss, require_faiss, searches_on_gpu, torch_search, unit

PUBLISHED = ("size", "memory_size", "k", "temperature")  # settings that make another protocol when they are changed
EXACT_ON_CPU = 1_000_000  # patches
QUERIES = 2048  # patches that are searched for together: image by image, faiss takes several times longer


@dataclass
class Settings(SheetSettings, FeatureSettings):
    """In-context segmentation."""

    data: DataSettings
    size: int = 512
    """Side in pixels of the squares that images are resized to. For a patch that does not divide it, the multiple of
    the patch below it is used."""
    memory_size: int = 10_240_000
    """Patches in the memory, at most."""
    k: int = 30
    """Neighbors that a patch attends to; all of a memory that holds fewer."""
    temperature: float = 0.02
    """Of the softmax over similarities."""
    index: Literal["auto", "exact", "ivf"] = "auto"
    """Search: exact, or by an inverted file, which compares about a sixteenth of the memory and runs on the CPU. auto
    is exact on a GPU, on a CPU up to a million patches, and where faiss does not load."""
    share: int = 1
    """The memory is of one of so many of the training images, drawn by the seed: few-shot, as published with 8, 64 and
    128. Named in the figure's id."""
    seeds: int = 1
    """Memories that are drawn, by `seed` and the numbers after it. The figure is their mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.share, self.seeds) < 1 or self.share > 10**6 or self.seeds > 1000:
            raise ValueError(f"share is {self.share} and seeds {self.seeds}; give 1 or more of both")
        if min(self.size, self.memory_size) < 1 or not 1 <= self.k <= 2048 or not 0 < self.temperature < math.inf:
            raise ValueError("size and memory-size must be 1 or more, k 1 to 2048, and temperature above 0")


Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Unit vectors float32 [P, D] -> similarities float32 [P, k], highest first, and rows of the memory int64 [P, k]."""


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure in-context segmentation as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used, or no faiss for an
            inverted file.
    """
    if settings.index == "ivf":
        require_faiss()
    context = prepare(settings, "retrieval")
    train = open_split(settings.data, settings.data.train_split or default_train_split(settings.data.name))
    val = open_split(settings.data, settings.data.split)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    memories = [draw_images(train, settings.share, seed) for seed in seeds]
    count, size = len(memories[0]), context.backbone.multiple_below(settings.size)
    per_image = min(settings.memory_size // count, (size // context.backbone.patch) ** 2)
    if per_image < 1:
        raise ValueError(f"memory-size is {settings.memory_size}: give one or more for each of {count:,} images")
    gpu = context.device if searches_on_gpu(context.device) else None
    small = per_image * count <= EXACT_ON_CPU
    exact = settings.index == "exact" or (
        settings.index == "auto" and (gpu is not None or small or find_faiss() is None)
    )
    dim = context.backbone.dim * max(map(len, context.choices))
    require_memory(per_image * count, dim, len(train.classes), exact, gpu)
    changed = changed_settings(settings)
    few = f"/1-of-{settings.share}" if settings.share > 1 else ""
    protocol = protocol_id(context, f"{val.name}-retrieval/hummingbird{few}", bool(changed))
    lines = [described(train), described(val)]
    if train.split == val.split:
        lines.append(f"warning: the memory holds {val.split}, which is measured: patches find themselves")
    announce(context, protocol, *lines)

    queries = square_features(context, val, size)
    runs, predictions = [], dict[int, np.ndarray]()
    for seed, images in zip(seeds, memories, strict=True):
        outcome = measure(context, settings, images, val, queries, per_image, exact, seed)
        predictions = predictions or outcome.predictions
        runs.append(figures(context, outcome, val.classes))
    miou, details = mean_figures(runs) if len(runs) > 1 else runs[0]
    details |= {"image_size": size, "changed_settings": changed}
    how = f"memory of {details['memory_patches']:,} patches of {details['train_images']:,} images "
    how += f"({train.split}{f', 1 of {settings.share}' if settings.share > 1 else ''}), "
    how += f"{details['neighbours']} neighbors, search {details['search']}"
    how += f", mean of {len(runs)} draws" if len(runs) > 1 else ""
    return finish_segmentation(context, protocol, val, miou, details, predictions, how, "published")


def measure(
    context: Context,
    settings: Settings,
    train: SegmentationSet,
    val: SegmentationSet,
    queries: Features,
    per_image: int,
    exact: bool,
    seed: int,
) -> Outcome:
    """What a memory of `train`, whose images give at most `per_image` patches each, makes of the images of `val`, whose
    features are the `queries`."""
    device = context.device
    gpu = device if searches_on_gpu(device) else None
    in_memory = square_features(context, train, queries.grid[0] * context.backbone.patch)
    patches, labels = choose_patches(train, in_memory.grid, per_image, seed, context.workers)
    if len(labels) == 0:
        raise ValueError(f"{train.name} {train.split} has no labeled patch: every mask is void")
    tally = Tally(len(context.choices), len(val), len(val.classes), device, choose_shown(val))
    for number, choice in enumerate(context.choices):
        memory = build_memory(in_memory, choice, patches)
        search, name = make_search(memory, min(settings.k, len(memory)), exact, gpu)
        del memory  # an index on a GPU or an inverted file has a copy of it
        for index, mask, prediction in segment(queries, choice, val, search, labels, settings.temperature, device):
            tally.add(number, index, mask, prediction)
        del search
    outcome = tally.outcome()
    outcome.details = {
        "train_split": train.split,
        "train_images": len(train),
        "memory_patches": len(labels),
        "patches_per_image": per_image,
        "neighbours": min(settings.k, len(labels)),  # as in all results so far
        "search": name,
    }
    return outcome


def draw_images(train: SegmentationSet, share: int, seed: int) -> SegmentationSet:
    """One of `share` of the images, at least one, in their order; all of them where it is 1."""
    if share == 1:
        return train
    count = max(1, len(train) // share)
    rows = np.sort(np.random.default_rng((seed, share)).choice(len(train), count, replace=False)).tolist()
    names, images, masks = (tuple(kept[row] for row in rows) for kept in (train.names, train.images, train.masks))
    return replace(train, names=names, images=images, masks=masks)


def mean_figures(runs: Sequence[Figures]) -> Figures:
    """The mean of several draws; with the standard deviation of their mIoU in the place of the interval."""
    mious = [run.miou for run in runs]
    details = {name: value for name, value in runs[0].details.items() if name != "interval_95"}
    accuracies = [run.details["pixel_accuracy"] for run in runs]
    ious = {name: [run.details["iou"][name] for run in runs] for name in details["iou"]}
    details["iou"] = {name: None if None in values else float(np.mean(values)) for name, values in ious.items()}
    details |= {
        "pixel_accuracy": float(np.mean(accuracies)),
        "std": float(np.std(mious, ddof=1)),
        "miou_of_draws": mious,
    }
    for place, row in enumerate(details.get("every_block", [])):
        same = [run.details["every_block"][place] for run in runs]
        means = {name: float(np.mean([each[name] for each in same])) for name in ("miou", "pixel_accuracy")}
        details["every_block"][place] = {"block": row["block"], **means}
    return Figures(float(np.mean(mious)), details)


def choose_patches(
    images: SegmentationSet, grid: tuple[int, int], per_image: int, seed: int, workers: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Which patches of each image are kept, and the shares of the classes in them.

    Args:
        grid: patches in a column and in a row: h, w.
        per_image: at most so many patches of an image are kept; see `sample_patches`.
        seed: of the choice, which depends on it and on the image's place in the set alone.

    Returns:
        N arrays int64 [n], ascending patches in row order; and float16 [sum of n, C], rows adding up to 1.

    Raises:
        ValueError: an unreadable mask, or one that is not as large as its image.
    """
    labels = np.empty((len(images) * min(per_image, grid[0] * grid[1]), len(images.classes)), np.float16)
    patches, filled = [], 0
    for index, grid_shares in enumerate(read_label_shares(images, range(len(images)), grid, workers)):
        shares = grid_shares.reshape(-1, grid_shares.shape[-1])
        kept = sample_patches(shares, per_image, np.random.default_rng((seed, index)))
        labels[filled : filled + len(kept)] = shares[kept] / shares[kept].sum(1, keepdims=True)
        filled += len(kept)
        patches.append(kept)
    return patches, labels[:filled]


def sample_patches(shares: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most `count` labeled patches of an image, those with its rare classes preferred.

    Source: Hummingbird (arXiv 2306.01667), as reproduced in vpariza/open-hummingbird-eval; see the top of this file.

    Args:
        shares: float32 [P, C] of the classes in P patches; a patch without a label has none.

    Returns:
        int64 [n], ascending; all labeled patches where there are no more than `count`.
    """
    held = shares > 0
    labeled = np.flatnonzero(held.any(1))
    if len(labeled) <= count:
        return labeled
    patches_of_class = held.sum(0)
    score = (held[labeled] * patches_of_class).sum(1) * rng.random(len(labeled))
    return np.sort(labeled[np.argsort(score, kind="stable")[:count]])


def build_memory(features: Features, blocks: Sequence[int], patches: Sequence[np.ndarray]) -> np.ndarray:
    """Unit features of the chosen patches of every image, float32 [sum of n, D * len(blocks)].

    Args:
        patches: for each image int64 [n], patches in row order.
    """
    memory = np.empty((sum(map(len, patches)), features.dim * len(blocks)), np.float32)
    filled = 0
    for row, kept in enumerate(Progress(patches, desc="memory", unit="image", active=rank() == 0)):
        memory[filled : filled + len(kept)] = unit(features.read([row], blocks).flatten(0, 2).numpy()[kept])
        filled += len(kept)
    return memory


def make_search(memory: np.ndarray, k: int, exact: bool, gpu: torch.device | None) -> tuple[Search, str]:
    """A search of the k rows of `memory` that have the largest inner product with a query, and its name.

    The inverted file has as many lists as the square root of the rows, and a sixteenth of them is looked at; where they
    hold fewer than k rows, the others are -1, at a similarity of about -3e38.

    Args:
        memory: float32 [M, D], M >= k.
        gpu: where an exact search runs; None for the CPU.
    """
    if exact and find_faiss() is None:
        bank = torch.from_numpy(memory).to(gpu or "cpu")
        name = f"exact, by torch, on {'the CPU' if gpu is None else 'a GPU'}"
        return lambda queries: torch_search(bank, queries, k), name
    faiss = require_faiss()
    if exact and gpu is None:  # what IndexFlatIP does, without a copy of the memory
        return lambda queries: faiss.knn(queries, memory, k, faiss.METRIC_INNER_PRODUCT), "exact, on the CPU"
    index = faiss.IndexFlatIP(memory.shape[1])
    if exact and gpu is not None:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), gpu.index or 0, index)
        name = "exact, on a GPU"
    else:
        lists = math.isqrt(len(memory))
        index = faiss.IndexIVFFlat(index, memory.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = -(-lists // 16)
        index.cp.min_points_per_centroid = 1  # no complaint about a small memory
        index.train(memory)
        name = f"inverted file, {index.nprobe} of {lists} lists, on the CPU"
    index.add(memory)
    return lambda queries: index.search(queries, k), name


def in_context_labels(similarities: np.ndarray, rows: np.ndarray, labels: np.ndarray, temperature: float) -> np.ndarray:
    """The mean of the neighbors' labels, weighted by the softmax of similarity / temperature.

    Args:
        similarities: float [P, k], cosines; rows: int64 [P, k], the neighbors in the memory.
        labels: float [M, C].

    Returns:
        float32 [P, C].
    """
    logits = (similarities.astype(np.float64) - similarities.max(1, keepdims=True)) / temperature
    weights = np.exp(logits)
    weights /= weights.sum(1, keepdims=True)
    return (weights.astype(np.float32)[:, None] @ labels[rows].astype(np.float32))[:, 0]


def segment(
    queries: Features,
    blocks: Sequence[int],
    images: SegmentationSet,
    search: Search,
    labels: np.ndarray,
    temperature: float,
    device: torch.device,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This process's share of the images, one after the other.

    Args:
        queries: features of the images; labels: float [M, C] of the memory that `search` searches.

    Yields:
        The image's place in the set, its true mask uint8 [H, W], and the predicted one int64 [H, W].
    """
    mine = range(rank(), len(images), world_size())
    together = max(1, QUERIES // (queries.grid[0] * queries.grid[1]))
    with Progress(total=len(mine), desc=f"{images.name} {images.split}", unit="image", active=rank() == 0) as progress:
        for batch in (mine[first : first + together] for first in range(0, len(mine), together)):
            x = unit(queries.read(batch, blocks).flatten(0, 2).numpy())
            shares = torch.from_numpy(in_context_labels(*search(x), labels, temperature)).to(device, non_blocking=True)
            for index, image_shares in zip(batch, shares.chunk(len(batch)), strict=True):
                mask = torch.from_numpy(images.read_matched_mask(index)).to(device, non_blocking=True)
                yield index, mask, predict(image_shares.T.unflatten(1, queries.grid), mask.shape)
                progress.update()


def require_memory(rows: int, dim: int, classes: int, exact: bool, gpu: torch.device | None) -> None:
    """Raises ValueError where a memory of so many rows cannot fit, on the host or on the GPU."""
    features = 4 * rows * dim
    process = (1 if exact else 2) * features + 2 * rows * classes  # an inverted file is filled from the memory
    places = [("this machine", int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * process, host_memory())]
    if gpu is not None and exact:
        places.append((str(gpu), features, float(torch.cuda.mem_get_info(gpu)[0])))
    for place, need, there in places:
        if need > there:
            raise ValueError(
                f"a memory of {rows:,} patches needs {need / 1e9:.1f} GB, and {place} has {there / 1e9:.1f} GB; give "
                "a smaller --memory-size"
            )


def changed_settings(settings: Settings) -> dict[str, list[Any]]:
    """Settings that differ from the published ones: {name: [published, used]}."""
    defaults = {field.name: field.default for field in fields(Settings)}
    changed = {name: [defaults[name], getattr(settings, name)] for name in PUBLISHED}
    changed["data.train_split"] = [default_train_split(settings.data.name)] * 2
    if settings.data.train_split is not None:
        changed["data.train_split"][1] = settings.data.train_split
    return {name: [published, used] for name, (published, used) in changed.items() if published != used}


def default_train_split(name: str) -> str:
    """Hummingbird's memory is of VOC's trainaug."""
    return "trainaug" if name == "voc12" else "train"


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
