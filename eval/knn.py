"""k-NN classification: how well the nearest training images tell an image's class, from frozen features.

    python eval/knn.py --ckpt runs/photos --data.root imagenette --out knn
    python eval/knn.py --ckpt dino_vits16.pth --data.root imagenet --batch-size 256 --out knn
    python eval/knn.py --ckpt runs/photos --data.name cifar10 --data.root cifar --every-block

DINO's protocol (arXiv 2104.14294): central crops of 224 pixels, the final-normed CLS token of the last block, cosine
similarity, the k nearest training images vote with weight exp(similarity / 0.07). Nothing is trained and nothing is
chosen on the images that are classified: the figure is the one for the first of --k. Neighbors are found
exactly, by faiss or torch. Features are kept in --cache; an interrupted run is continued by the same command.
"""

import skipless.common.interruption  # noqa: F401

import math
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

from skipless.common import cli
from skipless.datasets.labels.classes import LabeledData, open_splits
from skipless.eval.classification import (
    Pooling,
    accuracy,
    block_rows,
    every_block,
    headline,
    pooled_features,
    vectors,
    warnings,
)
from skipless.eval.evaluation import FeatureSettings, announce, finish, name_blocks, prepare
from skipless.eval.neighbors import knn_predict, nearest


@dataclass
class Settings(FeatureSettings):
    """k-NN classification."""

    data: LabeledData
    k: tuple[int, ...] = (20, 10, 100, 200)
    """Neighbors that vote, as in 20 10; accuracy is given for each, and the first is the figure."""
    temperature: float = 0.07
    """Of the votes' weights."""
    pool: Pooling = "auto"
    """The vector of an image: its CLS token, the mean of its patch tokens, or both side by side; auto is what the head
    read in training, where the checkpoint says it, and else cls. The figure's id names what is not cls."""
    size: int = 224
    """Side in pixels of the central crops."""
    _: KW_ONLY
    batch_size: int = 64
    """Images in one forward pass of the backbone. Changes speed and memory alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.k or min(*self.k, self.size) < 1 or not 0 < self.temperature < math.inf:
            raise ValueError("k and size must be 1 or more, and temperature above 0")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure k-NN accuracy as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    context = prepare(settings, "knn")
    # What is measured, and the id names: patches may not divide the size that was asked for.
    size = context.backbone.multiple_below(settings.size)
    settings = replace(settings, pool=context.recorded["pool"], size=size)
    train, val = open_splits(settings.data)
    if max(settings.k) > len(train):
        raise ValueError(
            f"k is {max(settings.k)}, and {train.name} {train.split} has {len(train):,} images: give fewer, as in --k "
            f"{min(20, len(train))}"
        )
    protocol = protocol_id(settings, val.name, context.choices[-1])
    announce(context, protocol, *warnings(context.backbone, settings.pool, train, val))

    bank, queries = (pooled_features(context, images, settings.size) for images in (train, val))
    hits = []  # [choice] -> {k: bool [N]}
    for choice in context.choices:
        similarities, rows = nearest(
            vectors(bank, choice, settings.pool).numpy(),
            vectors(queries, choice, settings.pool).numpy(),
            max(settings.k),
            context.device,
        )
        labels = train.labels[rows]
        votes = {
            k: knn_predict(similarities[:, :k], labels[:, :k], len(train.classes), settings.temperature)
            for k in settings.k
        }
        hits.append({k: vote == val.labels for k, vote in votes.items()})
    figures = [accuracy(by_k[settings.k[0]], settings.seed) for by_k in hits]
    details: dict[str, Any] = {
        "train_images": len(train),
        "classes": len(val.classes),
        "blocks": [block + 1 for block in context.choices[-1]],
        **figures[-1],
        "by_k": {str(k): float(hit.mean()) for k, hit in hits[-1].items()},
    }
    if settings.every_block:
        details["every_block"] = every_block(context, figures)
    return finish(context, protocol, val, "top-1", details["top1"], details, report)


def protocol_id(settings: Settings, name: str, blocks: tuple[int, ...]) -> str:
    """As in `imagenette-knn/20`, with every departure from DINO's way named behind it."""
    parts = [f"{name}-knn", str(settings.k[0])]
    if settings.pool != "cls":
        parts.append(settings.pool)
    if settings.blocks != "last":
        parts.append(name_blocks(blocks))
    if settings.size != 224:
        parts.append(f"{settings.size}px")
    if settings.temperature != 0.07:
        parts.append(f"temperature-{settings.temperature:g}")
    return "/".join(parts)


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details = result["details"]
    lines = headline(result)
    lines += block_rows(details, f"{result['settings']['k'][0]}-NN top-1")
    lines += ["| k | top-1 |", "|---:|---:|"]
    lines += [f"| {k} | {100 * top1:.1f} |" for k, top1 in details["by_k"].items()]
    return "\n".join(lines) + "\n"


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
