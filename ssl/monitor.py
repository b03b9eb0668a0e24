"""Is it learning? k-NN accuracy and token statistics of every block, and pictures, during training."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from skipless.common.distributed import gather_objects, rank, world_size
from skipless.common.pixels import center_crop, normalize
from skipless.datasets.images import ImageSource, UnreadableImage, open_images
from skipless.ssl.data.loader import leave_signals_to_main, shared
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.dino import DINOOutput, Pool, diagnose_collapse
from skipless.ssl.model.statistics import DEAD, cheap_conditioning, effective_rank, mean_share
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.pictures import Pictures, Sheets

STATISTICS = 512
"""Queries that token statistics are of: they take an eigendecomposition an image, which some versions of torch compute
one by one on a GPU."""

MOST_PICTURES = 64  # side by side


@dataclass
class MonitorSettings:
    """How training is watched, where labels exist. Labels are never trained on."""

    every_epochs: int = 10
    """Epochs between two measurements; also before the first and after the last. 0 turns the monitor off."""
    path: str | None = None
    """Labeled images to classify, as class folders. By default the folder `val` beside a data.path that is called
    `train`; without it, every tenth training image."""
    size: int | None = None
    """Side of the images in pixels, after a resize of the short side to 8/7 of it; by default that of
    the global crops."""
    k: int = 20
    """Neighbors that vote, weighted by exp(cosine similarity / 0.07)."""
    conditioning: bool = False
    """Log the conditioning of every block too (ssl/model/statistics.py): entropy and diagonal dominance of attention,
    singular values of W_V W_O, excess kurtosis. On 16 training images, in the same places; needs no labels."""
    pictures: int = 4
    """So many training images are drawn at every measurement, their patches in PCA colors: into pictures/ in the run's
    folder, for TensorBoard and `skipless watch`. Without labels, token statistics are of them."""
    max_images: int = 10000
    """At most so many images are used as neighbors, and as many are classified, evenly spread over the set."""

    def __post_init__(self) -> None:
        if self.every_epochs < 0 or self.k < 1 or self.max_images < 1:
            raise ValueError(
                "monitor.every_epochs cannot be negative; monitor.k and monitor.max_images must be at least 1"
            )
        if self.pictures > MOST_PICTURES:
            raise ValueError(f"monitor.pictures is {self.pictures}; give {MOST_PICTURES} at most")
        if self.conditioning and not self.every_epochs:
            raise ValueError(
                "monitor.conditioning is true, and monitor.every_epochs 0 turns the monitor off: give 1 or more"
            )


class Monitor:
    """What is measured during training: k-NN where there are labels, token statistics, pictures, and conditioning if
    it is wanted.

    Args:
        size: side of the global crops in pixels; pool: what k-NN reads, as the head does; workers: loader processes.
        out: the run's folder.

    Raises:
        ValueError: `settings.path` does not fit the images.
    """

    def __init__(
        self,
        settings: MonitorSettings,
        images: ImageSource,
        size: int,
        pool: Pool,
        device: torch.device,
        workers: int,
        out: str,
    ):
        self.settings, self.pool, self.workers = settings, pool, workers
        self.sets = labeled_sets(images, settings, size)
        conditioning = settings.conditioning and settings.every_epochs
        self.squares = normalized_squares(images, 16, size).to(device) if conditioning else None
        self.pictures: Pictures | None = None
        if settings.pictures and settings.every_epochs:
            self.pictures = Pictures(images, settings.pictures, settings.size or size, Path(out, "pictures"), device)

    @property
    def metric(self) -> str | None:
        """The name of one of its metrics; None where there is nothing to measure."""
        if self.sets:
            return "monitor/knn"
        if self.pictures is not None:
            return "monitor/effective_rank"
        return None if self.squares is None else "monitor/conditioning/kurtosis"

    def introduction(self) -> list[str]:
        """A line about what is measured, for the start of a run; none if the monitor is turned off."""
        if not self.settings.every_epochs:
            return []
        return [f"k-NN monitor: {self.sets[2] if self.sets else 'off, since the images have no class folders'}"]

    def __call__(
        self, backbone: VisionTransformer, autocast: AbstractContextManager[Any]
    ) -> tuple[dict[str, list[float]], str | None, Sheets]:
        """Metrics, each with a value a block, a line for people, and pictures: of the backbone as evaluations see it,
        without stochastic depth. All processes must call it."""
        training = backbone.training
        backbone.eval()
        metrics: dict[str, list[float]] = {}
        text, sheets = None, Sheets()
        if self.pictures is not None:
            statistics, sheets = self.pictures(backbone, autocast)
            metrics = {f"monitor/{name}": values for name, values in statistics.items()}
            last = ", ".join(f"{name.replace('_', ' ')} {values[-1]:.2f}" for name, values in statistics.items())
            text = f"patches of {len(self.pictures.squares)} images, last block: {last or 'not finite'}"
        if self.sets:
            with autocast:
                blocks = measure_blocks(backbone, *self.sets[:2], self.settings.k, self.pool, self.workers)
            metrics |= {f"monitor/{name}": [block[name] for block in blocks] for name in blocks[0]}
            text = describe_blocks(blocks, self.settings.k)
        if self.squares is not None:
            conditioning = cheap_conditioning(backbone, self.squares)
            metrics |= {f"monitor/conditioning/{name}": values for name, values in conditioning.items()}
        backbone.train(training)
        return metrics, text, sheets


class CollapseAlarm:
    """Calls out collapse once, when five log lines in a row look like it, and once a dead block: one after which all
    patch tokens of an image are the same vector, twice in a row, where at every fifth line some images are looked at.

    Args:
        prototypes: K; warmup: steps at the start, in which a network may look so.
        backbone: gives that of the student, whole; autocast: what it runs in.
    """

    PATIENCE, IMAGES = 5, 8

    def __init__(
        self,
        prototypes: int,
        warmup: int,
        backbone: Callable[[], VisionTransformer],
        autocast: AbstractContextManager[Any],
    ):
        self.prototypes, self.warmup, self.backbone, self.autocast = prototypes, warmup, backbone, autocast
        self.suspicions = self.lines = 0
        self.dead: set[int] | None = set()  # when last looked for; None once said

    def __call__(self, step: int, means: dict[str, float], images: Tensor) -> list[str]:
        """Warnings, if any. All processes must call it.

        Args:
            means: of what `DINOOutput` holds, and maybe of other losses.
            images: [N, 3, H, W], as the student sees them.
        """
        cause = diagnose_collapse(prototypes=self.prototypes, **{name: means[name] for name in DINOOutput._fields})
        self.suspicions = self.suspicions + 1 if cause and step > self.warmup else 0
        causes = [cause] if self.suspicions == self.PATIENCE else []
        self.lines += 1
        if self.lines % self.PATIENCE == 0 and step > self.warmup and self.dead is not None:
            causes += self._look_for_dead_blocks(images[: self.IMAGES])
        return [f"WARNING at step {step}: {cause}" for cause in causes]

    @torch.no_grad()
    def _look_for_dead_blocks(self, images: Tensor) -> list[str]:
        network = self.backbone()
        with self.autocast:
            blocks = network.features(images, blocks=range(network.depth), norm=False)
        shares = [mean_share(block.patches.flatten(1, 2)).mean().item() for block in blocks]
        dead = {number for number, share in enumerate(shares, 1) if share > DEAD}
        lasting, self.dead = dead & (self.dead or set()), dead
        if not lasting:
            return []
        self.dead = None
        return [
            f"block {min(lasting)} of {network.depth} is dead: after it all patch tokens of an image are one vector; "
            "start again with a lower learning rate (--optimizer.lr), and without skip connections with --model.init "
            "small or a larger --model.beta"
        ]


class LabeledImages(Dataset):
    """Center crops of some images of a source, uint8 [S, S, 3], with their labels and positions. Unreadable images come
    as None."""

    def __init__(self, images: ImageSource, indices: np.ndarray, labels: np.ndarray, size: int):
        self.images, self.indices, self.labels, self.size = images, indices, labels, size

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int, int] | None:
        resize = round(self.size * 8 / 7)
        try:
            image = self.images.read(int(self.indices[position]), min_side=resize)
        except UnreadableImage:
            return None
        return torch.from_numpy(center_crop(image, self.size, resize)), int(self.labels[position]), position


def labeled_sets(
    images: ImageSource, settings: MonitorSettings, default_size: int
) -> tuple[LabeledImages, LabeledImages, str] | None:
    """Neighbors and queries for the monitor and a sentence that says what they are; None without labels.

    Raises:
        ValueError: `settings.path` is given, but its class folders are not those of the training images.
    """
    size = settings.size or default_size
    if not settings.every_epochs:
        return None
    if images.labels is None:
        if settings.path:
            raise ValueError(
                f"monitor.path is {settings.path}, but {images.origin} has no class folders to take neighbors from; "
                "give class folders as data.path, or leave monitor.path out"
            )
        return None
    queries = _labeled_val(images, settings.path)
    if queries is not None and queries.labels is not None:
        number = {name: position for position, name in enumerate(images.classes)}
        query_labels = np.array([number[name] for name in queries.classes])[queries.labels]
        bank_rows, query_rows = np.arange(len(images)), np.arange(len(queries))
        description = f"images of {queries.origin}, neighbors from {images.origin}"
    else:
        queries, query_labels = images, images.labels
        tenth = np.arange(len(images)) % 10 == 0
        bank_rows, query_rows = np.flatnonzero(~tenth), np.flatnonzero(tenth)
        description = f"every tenth image of {images.origin}, neighbors from the other nine"
    bank_rows, query_rows = (_spread(rows, settings.max_images) for rows in (bank_rows, query_rows))
    bank = LabeledImages(images, bank_rows, images.labels[bank_rows], size)
    return bank, LabeledImages(queries, query_rows, query_labels[query_rows], size), description


def _labeled_val(images: ImageSource, path: str | None) -> ImageSource | None:
    """Images in class folders of the same names: in `path`, or, if there are any, in `val` beside a folder `train`."""
    beside = images.root.parent / "val"
    if not path and not (images.root.name == "train" and beside.is_dir()):
        return None
    try:
        val = open_images(path or beside)
        if val.labels is None or not set(val.classes) <= set(images.classes):
            raise ValueError(f"monitor.path is {path}, which does not have the class folders of {images.origin}")
        return val
    except (ValueError, FileNotFoundError):
        if path:
            raise
        return None  # nobody asked for it


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(int)]


@torch.inference_mode()
def measure_blocks(
    backbone: VisionTransformer, bank: LabeledImages, queries: LabeledImages, k: int, pool: Pool, workers: int = 0
) -> list[dict[str, float]]:
    """k-NN accuracy and token statistics after every block.

    Images are shared out over the processes; all of them get the result. The feature of an image is its class token or
    the mean of its patch tokens after the final norm; the statistics are those of the patch tokens before it, over at
    most STATISTICS queries, evenly spread.

    Returns:
        For each block {"knn": top-1 in [0, 1], "mean_share": in [0, 1], "effective_rank": >= 1}.
    """
    bank_features, bank_labels, _ = _describe(backbone, bank, pool, workers, statistics=0)
    query_features, query_labels, statistics = _describe(backbone, queries, pool, workers, STATISTICS)
    share, effective = statistics.mean(axis=0).T
    device = backbone.pos_embed.device
    return [
        {
            "knn": knn_accuracy(
                bank_features[block], bank_labels, query_features[block], query_labels, k, device=device
            ),
            "mean_share": float(share[block]),
            "effective_rank": float(effective[block]),
        }
        for block in range(backbone.depth)
    ]


def describe_blocks(blocks: list[dict[str, float]], k: int) -> str:
    """One line on what `measure_blocks` found, and one more where the last block is dead."""
    last, best = blocks[-1], max(range(len(blocks)), key=lambda i: blocks[i]["knn"])
    dead = (
        "\nWARNING: the last block's patch tokens are one and the same vector, and a model that starts so has not "
        "recovered here; in a skipless one --model.init small or a larger --model.beta mends it"
    )
    return (
        f"{k}-NN {100 * last['knn']:.1f} % (last block), best {100 * blocks[best]['knn']:.1f} % (block {best + 1}); "
        f"last block's mean share {last['mean_share']:.2f}, effective rank {last['effective_rank']:.1f}"
        f"{dead if last['mean_share'] > DEAD else ''}"
    )


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    k: int,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> float:
    """Top-1 accuracy of DINO's k-NN vote: cosine similarity, weights exp(similarity / temperature).

    Args:
        bank, queries: features [N, D] and [M, D].
        device: what computes.
    """
    classes, known = np.unique(bank_labels, return_inverse=True)
    labels, names = torch.from_numpy(known).to(device), torch.from_numpy(classes).to(device)
    features = F.normalize(torch.from_numpy(bank).to(device), dim=1)
    predicted = []
    with torch.autocast(torch.device(device).type, enabled=False):
        for some in torch.from_numpy(queries).to(device).split(1024):
            similarity, nearest = (F.normalize(some, dim=1) @ features.T).topk(min(k, len(bank)))
            votes = torch.zeros(len(some), len(classes), dtype=torch.float64, device=device)
            votes.scatter_add_(1, labels[nearest], (similarity.double() / temperature).exp())
            predicted.append(names[votes.argmax(1)].cpu().numpy())
    return float((np.concatenate(predicted) == query_labels).mean())


def _describe(
    backbone: VisionTransformer, images: LabeledImages, pool: Pool, workers: int, statistics: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features [depth, N, D] and labels [N] of all images, and (mean share, effective rank) [n, depth, 2] of some, at
    most `statistics` of them, whatever the number of processes."""
    device = backbone.norm.weight.device
    mine = torch.utils.data.Subset(images, range(rank(), len(images), world_size()))
    loader = DataLoader(
        mine,
        batch_size=64,
        num_workers=workers,
        collate_fn=partial(shared, _readable),
        worker_init_fn=leave_signals_to_main,
    )
    spread = np.linspace(0, len(images) - 1, min(statistics, len(images))).round().astype(int)
    features, labels, numbers = [], [], []
    for views, batch_labels, rows in loader:
        if not len(batch_labels):
            continue
        described = torch.from_numpy(np.isin(rows, spread).nonzero()[0]).to(device)
        blocks = backbone.features(normalize(views[None].to(device)), blocks=range(backbone.depth), norm=False)
        pooled, stats = [], []
        for block in blocks:
            patches = block.patches.flatten(1, 2).float()
            tokens = block.cls[:, None] if pool == "cls" else patches
            pooled.append(backbone.norm(tokens.float()).mean(1).cpu())
            if len(described):
                patches = patches[described]
                stats.append(torch.stack([mean_share(patches), effective_rank(patches)], dim=-1).cpu())
        features.append(torch.stack(pooled).numpy())
        labels.append(batch_labels)
        if stats:
            numbers.append(torch.stack(stats, dim=1).numpy())
    parts = gather_objects((features, labels, numbers))
    if not any(part[1] for part in parts):
        raise ValueError(f"none of the monitor's images in {images.images.origin} can be read")
    joined: Sequence[list] = [[batch for part in parts for batch in part[i]] for i in range(3)]
    return (
        np.concatenate(joined[0], axis=1),
        np.concatenate(joined[1]),
        np.concatenate([np.zeros((0, backbone.depth, 2)), *joined[2]]),
    )


def _readable(samples: list[tuple[Tensor, int, int] | None]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    kept = [sample for sample in samples if sample is not None]
    views = torch.stack([sample[0] for sample in kept]) if kept else torch.empty(0, dtype=torch.uint8)
    labels, positions = (np.array([sample[i] for sample in kept], dtype=np.int64) for i in (1, 2))
    return views, labels, positions
