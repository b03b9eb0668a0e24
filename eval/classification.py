"""What k-NN and linear classification share: the data sets, one vector an image, the result."""

from typing import Any, Literal

import numpy as np
import torch

from skipless.common.progress import duration
from skipless.datasets.labels.classes import LabeledSet
from skipless.eval.backbones import Backbone
from skipless.eval.evaluation import Context
from skipless.eval.features import Features, extract
from skipless.eval.metrics import bootstrap_interval
from skipless.ssl.dino import Pool

Pooling = Literal["auto", Pool, "both"]


def untrained_vector(trained: str | None, pool: str) -> str:
    """A sentence, where the vector of an image is one that no loss has seen; else nothing.

    Args:
        trained: what the head read in training, if that is known; pool: what was measured.
    """
    if {trained, pool} != {"cls", "mean"}:
        return ""
    names = {"cls": "CLS token", "mean": "mean of the patches"}
    return f"the head read the {names[str(trained)]} in training, and pool is {pool}, which it did not train"


def warnings(backbone: Backbone, pool: Pooling, train: LabeledSet, val: LabeledSet) -> list[str]:
    """Sentences, where the figure is one to be careful with."""
    lines = []
    if sentence := untrained_vector(backbone.pool, pool):
        lines.append(f"warning: {backbone.path}: {sentence}: --pool {backbone.pool} measures what it has learned")
    if train.split == val.split:
        lines.append(f"warning: {val.split} is both learned from and classified: images find themselves")
    return lines


def pooled_features(context: Context, images: LabeledSet, size: int) -> Features:
    """CLS and mean patch of central crops: the short side is resized to 8/7 of `size` (bicubic; 256 for 224), and the
    central square cut out. A size that is no multiple of the patch becomes the one below it."""
    size = context.backbone.multiple_below(size)
    return extract(
        context.backbone, images.places, images.read, size, context.blocks, context.cache, "tokens",
        context.batch_size, context.workers, f"features, {images.split}", round(size * 8 / 7), pooled=True,
        identity=images.identity,
    )  # fmt: skip


def vectors(features: Features, blocks: tuple[int, ...], pool: Pooling, rows: np.ndarray | None = None) -> torch.Tensor:
    """float32 [N, D * len(blocks)] of some images, by default all; twice as wide for "both", CLS first."""
    rows = np.arange(features.images) if rows is None else rows
    parts = []
    if pool in ("cls", "both"):
        parts.append(features.read_cls(rows, blocks))
    if pool in ("mean", "both"):
        parts.append(features.read(rows, blocks)[:, 0, 0])
    return torch.cat(parts, dim=1).float()


def accuracy(hits: np.ndarray, seed: int) -> dict[str, Any]:
    """{"top1", "interval_95": of a bootstrap over images} from hits, bool [N]."""
    return {"top1": float(hits.mean()), "interval_95": bootstrap_interval(hits, seed)}


def every_block(context: Context, figures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Figures, as from `accuracy`, with the numbers of the blocks that they are of."""
    return [{"block": choice[0] + 1, **figure} for choice, figure in zip(context.choices, figures, strict=True)]


def block_rows(details: dict[str, Any], title: str) -> list[str]:
    """A table of the accuracy of each block in Markdown; nothing where blocks were not measured one by one."""
    if "every_block" not in details:
        return []
    rows = [f"| {entry['block']} | {100 * entry['top1']:.1f} |" for entry in details["every_block"]]
    return [f"| block | {title} |", "|---:|---:|", *rows, ""]


def headline(result: dict[str, Any]) -> list[str]:
    """The first lines of a report in Markdown."""
    checkpoint, details = result["checkpoint"], result["details"]
    low, high = details["interval_95"]
    careful = untrained_vector(checkpoint.get("pool"), result["settings"]["pool"])
    interval = f"95 % interval {100 * low:.1f} to {100 * high:.1f}"
    return [
        f"**{result['protocol']}** {100 * result['value']:.1f} % top-1 ({interval})",
        "",
        f"{checkpoint['architecture']} ({checkpoint['path']}), blocks {', '.join(map(str, details['blocks']))}; "
        f"{result['dataset']} {result['split']}, {result['images']:,} images of {details['classes']} classes, "
        f"by {details['train_images']:,} training images; seed {result['seed']}; "
        f"{duration(result['seconds'])} on {result['hardware']}, {result['precision']}.",
        "",
        *([f"Careful: {careful}.", ""] if careful else []),
    ]
