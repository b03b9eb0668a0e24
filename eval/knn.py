"""k-NN classification: how well the nearest training images tell an image's class, from frozen features.

    python eval/knn.py --ckpt runs/photos --data.root imagenette --pool mean --out knn
    python eval/knn.py --ckpt dino_vits16.pth --data.root imagenet --batch-size 256 --out knn
    python eval/knn.py --ckpt runs/photos --data.name cifar10 --data.root cifar --pool mean --every-block

DINO's protocol (arXiv 2104.14294): central crops of 224 pixels, the final-normed CLS token of the last block, cosine
similarity, the k nearest training images vote with weight exp(similarity / 0.07). Nothing is trained and nothing is
chosen on the images that are classified: the figure is the one for the first of --k. Neighbours are found by faiss,
exactly, on a GPU where it has one. Features are kept in --cache; an interrupted run is continued by the same command.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipless.common import cli, distributed
from skipless.common.files import write_result
from skipless.common.settings import plain
from skipless.eval.backbones import Precision, Weights, choose_blocks, load_backbone, untrained
from skipless.eval.classification import (
    DataSettings,
    Pooling,
    accuracy,
    headline,
    open_labeled,
    pooled_features,
    vectors,
    warn_of_pool,
)
from skipless.eval.features import default_cache
from skipless.eval.neighbors import nearest, require_faiss
from skipless.eval.results import keep_other_result, result_of
from skipless.ssl.data.loader import loader_workers


@dataclass
class Settings:
    """k-NN classification."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    data: DataSettings
    k: tuple[int, ...] = (20, 10, 100, 200)
    """Neighbours that vote, as in 20 10; accuracy is given for each, and the first is the figure."""
    temperature: float = 0.07
    """Of the votes' weights."""
    pool: Pooling = "cls"
    """The vector of an image: its CLS token, the mean of its patch tokens, or both side by side."""
    blocks: str = "last"
    """Blocks whose vectors are concatenated: last, last4, or numbers from 1, as in 9,12."""
    every_block: bool = False
    """Accuracy of each block by itself."""
    size: int = 224
    """Side in pixels of the central crops."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    out: str | None = None
    """Folder for knn.json and knn.md; by default nothing is written."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""
    seed: int = 0
    """Of the bootstrap (and of random weights)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Precision = "fp32"
    """In which the network computes features: fp32, or bf16 where the device is fast in it. bf16 saves time on a GPU;
    a model without skips feels the rounding. The figure's id then ends in /bf16."""
    batch_size: int = 64
    """Images in one forward pass of the backbone. Changes speed and memory alone."""
    workers: int | None = None
    """Processes that read images; by default all cores shared out with a GPU, and none on a CPU, which needs them
    itself."""

    def __post_init__(self) -> None:
        if not self.k or min(*self.k, self.size, self.batch_size) < 1 or not 0 < self.temperature < math.inf:
            raise ValueError("k, size and batch-size must be 1 or more, and temperature above 0")
        if (self.workers or 0) < 0 or self.seed < 0:
            raise ValueError("workers and seed cannot be negative")


def knn_predict(
    similarities: np.ndarray, neighbour_labels: np.ndarray, classes: int, temperature: float = 0.07
) -> np.ndarray:
    """Classes by DINO's weighted vote.

    Args:
        similarities: float [M, k], cosines in [-1, 1].
        neighbour_labels: integers [M, k] in 0..classes - 1.

    Returns:
        int64 [M]. Ties go to the lower class.

    Example:
        >>> knn_predict(np.array([[0.9, 0.86, 0.85]]), np.array([[1, 0, 0]]), classes=2)
        array([0])
    """
    # Weights relative to the nearest: the same vote, and exp cannot overflow.
    weights = np.exp((similarities - similarities.max(1, keepdims=True)) / temperature)
    votes = np.zeros((len(similarities), classes))
    np.add.at(votes, (np.arange(len(similarities))[:, None], neighbour_labels), weights)
    return votes.argmax(1)


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure k-NN accuracy as `settings` say, write what `settings.out` asks for, and return the result.

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
    warn_of_pool(backbone, settings.pool)
    workers = loader_workers(settings.workers, device)
    choices = choose_blocks(settings.blocks, settings.every_block, backbone)
    train, val = open_labeled(settings.data)
    if max(settings.k) > len(train):
        raise ValueError(
            f"k is {max(settings.k)}, and {train.name} {train.split} has {len(train):,} images: give fewer, as in --k "
            f"{min(20, len(train))}"
        )
    protocol = protocol_id(settings, val.name, choices[-1])
    recorded = plain(settings) | {"precision": backbone.precision}
    out = Path(settings.out) if settings.out else None
    if out:
        keep_other_result(out / "knn.json", recorded)
    first = distributed.rank() == 0
    if first:
        on = f"on {device}, {backbone.described_precision}"
        print(f"{protocol}: {backbone.architecture} ({backbone.path}) {on}", flush=True)
    cache = Path(settings.cache).expanduser() if settings.cache else default_cache()
    blocks = sorted({block for choice in choices for block in choice})
    bank, queries = (
        pooled_features(backbone, images, settings.size, blocks, cache, settings.batch_size, workers)
        for images in (train, val)
    )
    by_choice = []  # [choice] -> {k: hits}
    for choice in choices:
        similarities, rows = nearest(
            vectors(bank, choice, settings.pool).numpy(),
            vectors(queries, choice, settings.pool).numpy(),
            max(settings.k),
            device,
        )
        by_choice.append(
            {
                k: knn_predict(similarities[:, :k], train.labels[rows[:, :k]], len(train.classes), settings.temperature)
                == val.labels
                for k in settings.k
            }
        )
    main = by_choice[-1]
    details: dict[str, Any] = {
        "train_images": len(train),
        "classes": len(val.classes),
        "blocks": [block + 1 for block in choices[-1]],
        **accuracy(main[settings.k[0]], settings.seed),
        "by_k": {str(k): float(hits.mean()) for k, hits in main.items()},
    }
    if settings.every_block:
        details["every_block"] = [
            {"block": choice[0] + 1, **accuracy(hits[settings.k[0]], settings.seed)}
            for choice, hits in zip(choices, by_choice, strict=True)
        ]
    result = result_of(
        "knn", protocol, val.name, val.split, len(val), "top-1", details["top1"], details, backbone, recorded,
        settings.seed, time.perf_counter() - began, device,
    )  # fmt: skip
    if first:
        text = report(result)
        if out:
            write_result(out / "knn", result, text)
        print("\n" + text, end="")
        if out:
            print(f"\nwritten: {out / 'knn.json'}, knn.md")
    return result


def protocol_id(settings: Settings, name: str, blocks: tuple[int, ...]) -> str:
    """As in `imagenette-knn/20`, with every departure from DINO's way named behind it."""
    parts = [f"{name}-knn", str(settings.k[0])]
    if settings.pool != "cls":
        parts.append(settings.pool)
    if settings.blocks != "last":
        parts.append("blocks-" + "-".join(str(block + 1) for block in blocks))
    if settings.size != 224:
        parts.append(f"{settings.size}px")
    if settings.temperature != 0.07:
        parts.append(f"temperature-{settings.temperature:g}")
    return "/".join(parts)


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details = result["details"]
    lines = headline(result)
    if "every_block" in details:
        k = result["settings"]["k"][0]
        lines += [f"| block | {k}-NN top-1 |", "|---:|---:|"]
        lines += [f"| {entry['block']} | {100 * entry['top1']:.1f} |" for entry in details["every_block"]]
        lines.append("")
    lines += ["| k | top-1 |", "|---:|---:|"]
    lines += [f"| {k} | {100 * top1:.1f} |" for k, top1 in details["by_k"].items()]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(evaluate, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
