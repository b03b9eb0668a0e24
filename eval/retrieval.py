"""In-context segmentation: patches are labeled by their nearest neighbors in a memory of labeled patches.

    python eval/retrieval.py --ckpt dino_deitsmall16_pretrain.pth --data.name voc12 --data.root VOCdevkit --out voc

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

Under torchrun every process holds the whole memory, and the evaluated images are dealt out. An interrupted run is
continued by the same command, which finds the features in the cache.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.common.distributed import all_reduce_sum, gather_objects, rank, world_size
from skipless.common.files import write_result
from skipless.common.settings import plain
from skipless.datasets.labels.counts import COUNTS, describe_split
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.backbones import Precision, Weights, choose_blocks, load_backbone, untrained
from skipless.eval.dense.data import DATA, DataSettings, image_of_pair
from skipless.eval.dense.labels import label_shares, predict
from skipless.eval.dense.report import PICTURES, draw, report
from skipless.eval.evaluation import keep_other_result, result_of
from skipless.eval.features import Features, default_cache, extract
from skipless.eval.metrics import confusion_matrix, image_counts, miou_interval, segmentation_scores
from skipless.eval.neighbors import require_faiss, unit
from skipless.ssl.data.loader import leave_signals_to_main, loader_workers

PUBLISHED = ("size", "memory_size", "k", "temperature")  # settings that make another protocol when they are changed
EXACT_ON_CPU = 1_000_000  # patches
QUERIES = (
    2048  # patches that are searched for together: one by one, or image by image, takes faiss several times longer
)


@dataclass
class MemoryData(DataSettings):
    """What is segmented, and what the memory is made of."""

    train_split: str | None = None
    """Split that fills the memory. By default train; on voc12 trainaug."""


@dataclass
class Settings:
    """In-context segmentation."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    data: MemoryData
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
    is exact on a GPU, and on a CPU up to a million patches."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    blocks: str = "last"
    """Blocks whose patch features are concatenated: last, last4, or numbers from 1, as in 3,6,9,12. Named in the
    figure's id where they are not the last."""
    every_block: bool = False
    """Make a memory of each block by itself, and report mIoU block by block."""
    out: str | None = None
    """Folder for retrieval.json, retrieval.md and pictures.png; by default nothing is written."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""
    seed: int = 0
    """Of the patches that are taken from an image, where not all fit, and of the bootstrap."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "fp32"
    """In which the network computes features: fp32, or bf16 where the device is fast in it. bf16 saves time on a GPU;
    a model without skips feels the rounding. The figure's id then ends in /bf16."""
    batch_size: int = 16
    """Images in one forward pass of the backbone. Changes speed and memory alone."""
    workers: int | None = None
    """Processes that read images; by default all cores shared out with a GPU, and none on a CPU, which needs them
    itself."""

    def __post_init__(self) -> None:
        if min(self.size, self.memory_size, self.batch_size) < 1 or min(self.workers or 0, self.seed) < 0:
            raise ValueError("size, memory-size and batch-size must be 1 or more, workers and seed 0 or more")
        if not 1 <= self.k <= 2048 or not 0 < self.temperature < math.inf:
            raise ValueError("k must be 1 to 2048, and temperature above 0")


Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Unit vectors float32 [P, D] -> similarities float32 [P, k], highest first, and rows of the memory int64 [P, k]."""


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure in-context segmentation as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used, or no faiss.
    """
    device = distributed.start(settings.device)
    began = time.perf_counter()
    faiss = require_faiss()
    backbone = load_backbone(settings.ckpt, settings.weights)
    if settings.untrained:
        backbone = untrained(backbone, settings.seed)
    backbone = backbone.to(device, settings.precision)
    workers = loader_workers(settings.workers, device)
    choices = choose_blocks(settings.blocks, settings.every_block, backbone)
    data = settings.data
    train = DATA[data.name](data.root, data.train_split or _default_train_split(data.name))
    val = DATA[data.name](data.root, data.split)
    size = max(settings.size // backbone.patch, 1) * backbone.patch
    per_image = min(settings.memory_size // len(train), (size // backbone.patch) ** 2)
    if per_image < 1:
        raise ValueError(f"memory-size is {settings.memory_size}: give one or more for each of {len(train):,} images")
    gpu = device.type == "cuda" and getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    exact = settings.index == "exact" or (settings.index == "auto" and (gpu or per_image * len(train) <= EXACT_ON_CPU))
    dim = backbone.dim * max(map(len, choices))
    _require_memory(per_image * len(train), dim, len(train.classes), exact, device if gpu else None)
    changed = changed_settings(settings)
    protocol = f"{data.name}-retrieval/hummingbird"
    if not settings.every_block and settings.blocks != "last":
        protocol += "/blocks-" + "-".join(str(block + 1) for block in choices[-1])
    protocol += " (changed)" if changed else ""
    recorded = plain(settings) | {"precision": backbone.precision}
    out = Path(settings.out) if settings.out else None
    if out:
        keep_other_result(out / "retrieval.json", recorded)
    first = rank() == 0
    if first:
        on = f"on {device}, {backbone.described_precision}"
        print(f"{protocol}: {backbone.architecture} ({backbone.path}) {on}", flush=True)
        for images in (train, val):
            print(describe_split(data.name, images.split, len(images)), flush=True)
        if train.split == val.split:
            print(f"warning: the memory holds {val.split}, which is measured: patches find themselves", flush=True)
        if out:
            out.mkdir(parents=True, exist_ok=True)

    cache = Path(settings.cache).expanduser() if settings.cache else default_cache()
    blocks = sorted({block for choice in choices for block in choice})
    in_memory, queries = (
        extract(
            backbone, images.images, partial(image_of_pair, images), size, blocks, cache, "tokens",
            settings.batch_size, workers, f"features, {images.split}",
        )
        for images in (train, val)
    )  # fmt: skip
    patches, labels = choose_patches(train, in_memory.grid, per_image, settings.seed, workers)
    if len(labels) == 0:
        raise ValueError(f"{train.name} {train.split} has no labeled patch: every mask is void")
    shown = np.linspace(0, len(val) - 1, min(PICTURES, len(val))).round().astype(int).tolist()
    scores, intervals = [], []
    for choice in choices:
        memory = build_memory(in_memory, choice, patches)
        search, name = make_search(memory, min(settings.k, len(memory)), exact, device if gpu else None)
        del memory  # an index on a GPU or an inverted file has a copy of it
        confusion, counts, predictions = segment(
            queries, choice, val, search, labels, settings.temperature, device, shown
        )
        scores.append(segmentation_scores(confusion))
        intervals.append(miou_interval(counts.cpu().numpy(), settings.seed))
        del search
    details: dict[str, Any] = {
        "blocks": [block + 1 for block in choices[-1]],
        "interval_95": intervals[-1],
        "pixel_accuracy": scores[-1].pixel_accuracy,
        "iou": {name: None if math.isnan(x) else x for name, x in zip(val.classes, scores[-1].iou, strict=True)},
        "image_size": size,
        "train_split": train.split,
        "train_images": len(train),
        "memory_patches": len(labels),
        "patches_per_image": per_image,
        "neighbours": min(settings.k, len(labels)),
        "search": name,
        "changed_settings": changed,
    }
    if settings.every_block:
        details["every_block"] = [
            {"block": choice[0] + 1, "miou": s.miou, "interval_95": interval, "pixel_accuracy": s.pixel_accuracy}
            for choice, s, interval in zip(choices, scores, intervals, strict=True)
        ]
    result = result_of(
        "retrieval", protocol, val.name, val.split, len(val), "mIoU", scores[-1].miou, details, backbone, recorded,
        settings.seed, time.perf_counter() - began, device, COUNTS.get((val.name, val.split)),
    )  # fmt: skip
    if first:
        text = report(result, how(details), "published")
        if out:
            draw(val, predictions, out / "pictures.png")
            write_result(out / "retrieval", result, text)
        print("\n" + text, end="")
        if out:
            print(f"\nwritten: {out / 'retrieval.json'}, retrieval.md, pictures.png")
    return result


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
    loader = DataLoader(
        _Shares(images, grid), batch_size=None, num_workers=workers, worker_init_fn=leave_signals_to_main
    )
    for index, found in enumerate(tqdm(loader, desc="labels of patches", unit="image", disable=rank() > 0)):
        if isinstance(found, str):
            raise ValueError(found)
        shares = found.numpy()
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
    for row, kept in enumerate(tqdm(patches, desc="memory", unit="image", disable=rank() > 0)):
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


@torch.inference_mode()
def segment(
    queries: Features,
    blocks: Sequence[int],
    images: SegmentationSet,
    search: Search,
    labels: np.ndarray,
    temperature: float,
    device: torch.device,
    shown: Sequence[int],
) -> tuple[Tensor, Tensor, dict[int, np.ndarray]]:
    """Label the images and compare.

    Args:
        queries: features of the images; labels: float [M, C] of the memory that `search` searches.
        shown: images whose prediction is wanted.

    Returns:
        int64 [C, C], summed over images and processes; `image_counts` of each image, int64 [N, 3, C]; and uint8 [H, W]
        for each of `shown`.
    """
    classes = len(images.classes)
    counts = torch.zeros(len(images), 3, classes, dtype=torch.int64, device=device)
    confusion = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    predictions = {}
    mine = range(rank(), len(images), world_size())
    together = max(1, QUERIES // (queries.grid[0] * queries.grid[1]))
    with tqdm(total=len(mine), desc=f"{images.name} {images.split}", unit="image", disable=rank() > 0) as progress:
        for batch in (mine[first : first + together] for first in range(0, len(mine), together)):
            x = unit(queries.read(batch, blocks).flatten(0, 2).numpy())
            found = torch.from_numpy(in_context_labels(*search(x), labels, temperature)).to(device)
            for index, of_image in zip(batch, found.chunk(len(batch)), strict=True):
                mask = torch.from_numpy(images.read_matched_mask(index)).to(device)
                prediction = predict(of_image.T.unflatten(1, queries.grid), mask.shape)
                of_image_alone = confusion_matrix(mask, prediction, classes)
                confusion += of_image_alone
                counts[index] = image_counts(of_image_alone)
                if index in shown:
                    predictions[index] = prediction.to(torch.uint8).cpu().numpy()
                progress.update()
    gathered = gather_objects(predictions)
    shown_predictions = {index: p for part in gathered for index, p in part.items()}
    return all_reduce_sum(confusion), all_reduce_sum(counts), shown_predictions


class _Shares(Dataset):
    """float32 [P, C] for each image: the shares of the classes in its patches. For an unreadable mask, the sentence
    that says so: an exception would reach the main process without its type."""

    def __init__(self, images: SegmentationSet, grid: tuple[int, int]):
        self.images, self.grid = images, grid

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            mask = self.images.read_matched_mask(index)
        except (ValueError, OSError) as error:
            return str(error)
        return torch.from_numpy(label_shares(mask, *self.grid, len(self.images.classes))).flatten(0, 1)


def _require_memory(rows: int, dim: int, classes: int, exact: bool, gpu: torch.device | None) -> None:
    """Raises ValueError where a memory of so many rows cannot fit, on the host or on the GPU."""
    features = 4 * rows * dim
    of_process = (1 if exact else 2) * features + 2 * rows * classes  # an inverted file is filled from the memory
    host = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if hasattr(os, "sysconf") else math.inf
    places = [("this machine", int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * of_process, host)]
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
    changed["data.train_split"] = [_default_train_split(settings.data.name)] * 2
    if settings.data.train_split is not None:
        changed["data.train_split"][1] = settings.data.train_split
    return {name: [published, used] for name, (published, used) in changed.items() if published != used}


def _default_train_split(name: str) -> str:
    return "trainaug" if name == "voc12" else "train"


def how(details: dict[str, Any]) -> str:
    """What was done, for the report."""
    return (
        f"memory of {details['memory_patches']:,} patches of {details['train_images']:,} images "
        f"({details['train_split']}), {details['neighbours']} neighbors, search {details['search']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(evaluate, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
