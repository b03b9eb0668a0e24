"""Linear classification: how well one linear layer tells an image's class, from frozen features.

In minutes on a CPU, on features of central crops that are computed once:

    python eval/linear.py --ckpt runs/photos --data.root imagenette --out linear

As published by DINO (arXiv 2104.14294), on random crops and flips, anew in every one of 100 epochs; on a GPU, or with
torchrun on several:

    python eval/linear.py --protocol dino --ckpt dino_vits16.pth --data.root imagenet --out linear

It departs from the published code where that reports the best epoch on the images it measures: here a tenth of the
training images (at most 10,000) is held out, and chooses among the learning rates. Weights start at 0, the cosine goes
by steps, and crops are resized bicubically.

Both concatenate the CLS tokens of the last four blocks (DINO's choice for ViT-S), and train by SGD with momentum, no
weight decay and a cosine schedule, with many learning rates at once. Which one counts is chosen on training images that
were held out, never on those that the figure is about. An interrupted run is continued by the same command.
"""

import skipless.common.interruption  # noqa: F401

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from skipless.common import cli
from skipless.common.settings import plain
from skipless.datasets.labels.classes import LabeledData, LabeledSet, open_splits
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
from skipless.eval.dense.heads import Heads, fit, row_batches
from skipless.eval.evaluation import FeatureSettings, announce, finish, name_blocks, prepare
from skipless.eval.random_crops import Plan, mean_loss, sgd, train_on_random_crops

HELD_OUT = 10000  # training images, at most
# Settings that tell the training on random crops from another one.
IDENTIFYING = (
    "ckpt", "data", "protocol", "learning_rates", "epochs", "images_per_step", "pool", "blocks", "every_block", "size",
    "weights", "untrained", "seed",
)  # fmt: skip


@dataclass
class Settings(FeatureSettings):
    """Linear classification."""

    data: LabeledData
    protocol: Literal["cached", "dino"] = "cached"
    """cached trains on features of central crops, standardized, computed once. dino trains on random crops and flips,
    as published: a forward pass over the training set in every epoch."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    """For 256 images a step, scaled with their number, as in 0.001 0.01. One head is trained with each; the held-out
    images choose."""
    epochs: int = 100
    """Passes over the training images."""
    images_per_step: int = 1024
    """Images whose gradients make a step, over all processes."""
    pool: Pooling = "auto"
    """The vector of an image: its CLS token, the mean of its patch tokens, or both side by side; auto is what the head
    read in training, where the checkpoint says it, and else cls. The figure's id names what is not cls."""
    size: int = 224
    """Side in pixels of the crops."""
    _: KW_ONLY
    out: str | None = None
    """Folder for linear.json and linear.md, and for dino head.pt, from which an interrupted run goes on; by default
    nothing is written."""
    blocks: str = "last4"
    """Blocks whose vectors are concatenated: last, last4, or numbers from 1, as in 9,12."""
    batch_size: int = 64
    """Images in one forward pass of the backbone. Changes speed and memory alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epochs, self.images_per_step, self.size) < 1:
            raise ValueError("epochs, images-per-step and size must be 1 or more")
        if not self.learning_rates or not all(0 < rate < math.inf for rate in self.learning_rates):
            raise ValueError("learning-rates must be above 0")


def evaluate(settings: Settings) -> dict[str, Any]:
    """Measure linear accuracy as `settings` say, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    context = prepare(settings, "linear")
    # What is measured, and the id names: patches may not divide the size that was asked for.
    size = context.backbone.multiple_below(settings.size)
    settings = replace(settings, pool=context.recorded["pool"], size=size)
    choices = context.choices
    train, val = open_splits(settings.data)
    if len(train) < 2:
        raise ValueError(f"{train.name} {train.split} has one image; two or more are needed, one of them held out")
    protocol = protocol_id(settings, val.name, choices[-1])
    lines = warnings(context.backbone, settings.pool, train, val)
    if context.device.type == "cpu" and settings.protocol == "dino":
        lines.append("each epoch is a pass of the network over all images; --protocol cached takes minutes")
    announce(context, protocol, *lines)
    kept, held_out = hold_out(len(train))
    classes = len(train.classes)
    rates = [rate * settings.images_per_step / 256 for rate in settings.learning_rates]

    def vectors_of(images: LabeledSet) -> list[Tensor]:
        """Vectors of the central crops, for each choice of blocks."""
        features = pooled_features(context, images, settings.size)
        return [vectors(features, choice, settings.pool) for choice in choices]

    x_val = vectors_of(val)  # before hours of training, so that what is wrong with it shows
    if settings.protocol == "cached":
        x_train = vectors_of(train)
        x_held_out = [x[held_out] for x in x_train]
        heads = train_on_crops([x[kept] for x in x_train], train.labels[kept], classes, rates, settings, context.device)
    else:
        x_held_out = vectors_of(train.take(held_out))
        plan = Plan(settings.images_per_step, settings.epochs, settings.size, settings.pool, settings.seed)
        identifying = {name: plain(settings)[name] for name in IDENTIFYING}
        heads = train_on_random_crops(context, train.take(kept), rates, plan, str(identifying))

    y_held_out = train.labels[held_out]
    chosen = [choose_rate(head, x, y_held_out) for head, x in zip(heads, x_held_out, strict=True)]
    figures = [
        accuracy(predict(head, x)[:, best] == val.labels, settings.seed)
        for head, x, (best, _) in zip(heads, x_val, chosen, strict=True)
    ]
    best, held_out_top1 = chosen[-1]
    details: dict[str, Any] = {
        "train_images": len(train),
        "classes": len(val.classes),
        "blocks": [block + 1 for block in choices[-1]],
        **figures[-1],
        "held_out_images": len(held_out),
        "learning_rate": settings.learning_rates[best],
        "held_out_top1": held_out_top1,
    }
    if settings.every_block:
        details["every_block"] = every_block(context, figures)
    return finish(context, protocol, val, "top-1", details["top1"], details, report)


def hold_out(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training set to train on, and those to choose the learning rate by: every tenth, at most HELD_OUT
    evenly spread; of fewer than ten, the first."""
    tenth = np.arange(9, count, 10) if count >= 10 else np.array([0])
    if len(tenth) > HELD_OUT:
        tenth = tenth[np.linspace(0, len(tenth) - 1, HELD_OUT).round().astype(int)]
    return np.setdiff1d(np.arange(count), tenth), tenth


def train_on_crops(
    x: Sequence[Tensor],
    labels: np.ndarray,
    classes: int,
    rates: Sequence[float],
    settings: Settings,
    device: torch.device,
) -> list[Heads]:
    """Heads on fixed vectors, standardized by their mean and standard deviation.

    Args:
        x: for each choice of blocks float32 [N, D].
        labels: int64 [N].
        rates: peak learning rates, one head each.
    """
    x, y = [rows.to(device) for rows in x], torch.from_numpy(labels).to(device)
    heads = []
    for rows in x:
        mean, std = rows.mean(0), rows.std(0, correction=0)
        # A channel that never changes, but for rounding, must not be blown up.
        heads.append(Heads(mean, torch.where(std > 1e-5 * mean.abs(), std, 1.0), len(rates), classes))

    def losses(batch: np.ndarray) -> Iterator[Tensor]:
        taken = torch.from_numpy(batch).to(device, non_blocking=True)
        for head, rows in zip(heads, x, strict=True):
            yield mean_loss(head(rows[taken]), y[taken])

    steps = settings.epochs * math.ceil(len(y) / settings.images_per_step)
    batches = row_batches(len(y), settings.images_per_step, range(settings.epochs), settings.seed)
    fit(heads, sgd(heads, rates), batches, steps, losses)
    return heads


@torch.inference_mode()
def predict(head: Heads, x: Tensor) -> np.ndarray:
    """Classes int64 [N, heads] of vectors [N, D]."""
    device = head.mean.device
    return np.concatenate([head(part.to(device)).argmax(-1).cpu().numpy() for part in x.split(4096)])


def choose_rate(head: Heads, x: Tensor, labels: np.ndarray) -> tuple[int, list[float]]:
    """The best of the heads on held-out images, the first of equals, and the accuracy of each."""
    accuracies = (predict(head, x) == labels[:, None]).mean(0)
    return int(accuracies.argmax()), accuracies.tolist()


def protocol_id(settings: Settings, name: str, blocks: tuple[int, ...]) -> str:
    """As in `imagenette-linear/dino`, with every departure from the protocol named behind it."""
    parts = [f"{name}-linear", settings.protocol]
    if settings.pool != "cls":
        parts.append(settings.pool)
    if settings.every_block or settings.blocks != "last4":
        parts.append(name_blocks(blocks))
    if settings.size != 224:
        parts.append(f"{settings.size}px")
    names = ("learning_rates", "epochs", "images_per_step")
    changed = any(getattr(settings, name) != getattr(Settings, name) for name in names)
    return "/".join(parts) + (" (changed)" if changed else "")


def report(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    details = result["details"]
    lines = headline(result)
    lines += block_rows(details, "top-1")
    lines += [
        f"{details['held_out_images']:,} of the training images were held out and chose the learning rate "
        f"{details['learning_rate']:g}:",
        "",
        "| learning rate (for 256 images a step) | top-1 on held-out images |",
        "|---:|---:|",
    ]
    rates = zip(result["settings"]["learning_rates"], details["held_out_top1"], strict=True)
    lines += [f"| {rate:g} | {100 * top1:.1f} |" for rate, top1 in rates]
    return "\n".join(lines) + "\n"


main = partial(cli.run, evaluate, Settings, __doc__)

if __name__ == "__main__":
    main()
