"""Linear classification: how well one linear layer tells an image's class, from frozen features.

In minutes on a CPU, on features of central crops that are computed once:

    python eval/linear.py --ckpt runs/photos --data.root imagenette --pool mean --out linear

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

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.common.files import write_atomically
from skipless.common.pixels import crop_box, resample
from skipless.common.settings import plain
from skipless.datasets.labels.classes import LabeledSet
from skipless.eval.backbones import Backbone
from skipless.eval.classification import (
    DataSettings,
    Pooling,
    accuracy,
    block_rows,
    every_block,
    headline,
    open_labeled,
    pooled_features,
    vectors,
    warn_of_pool,
)
from skipless.eval.dense.quick import Heads
from skipless.eval.evaluation import INCIDENTAL, LATER, FeatureSettings, announce, finish, name_blocks, prepare
from skipless.eval.features import data_sha256
from skipless.ssl.data.loader import leave_signals_to_main, loader_workers
from skipless.ssl.optim.schedules import cosine

HELD_OUT = 10000  # training images, at most


@dataclass
class Settings(FeatureSettings):
    """Linear classification."""

    data: DataSettings
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
    pool: Pooling = "cls"
    """The vector of an image: its CLS token, the mean of its patch tokens, or both side by side."""
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
    backbone, choices = context.backbone, context.choices
    warn_of_pool(backbone, settings.pool)
    train, val = open_labeled(settings.data)
    if len(train) < 2:
        raise ValueError(f"{train.name} {train.split} has one image; two or more are needed, one of them held out")
    protocol = protocol_id(settings, val.name, choices[-1])
    slow = context.device.type == "cpu" and settings.protocol == "dino"
    announce(
        context,
        protocol,
        *["each epoch is a pass of the network over all images; --protocol cached takes minutes"] * slow,
    )
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
        saved = context.out / "head.pt" if context.out else None
        heads = train_on_random_crops(backbone, train.take(kept), choices, rates, settings, saved)

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
    """Heads on fixed vectors, standardised by their mean and standard deviation.

    Each process trains them all and takes those of the first.

    Args:
        x: for each choice of blocks float32 [N, D].
        labels: int64 [N].
        rates: peak learning rates, one head each.
    """
    x, y = [of_choice.to(device) for of_choice in x], torch.from_numpy(labels).to(device)
    heads = []
    for of_choice in x:
        mean, std = of_choice.mean(0), of_choice.std(0, correction=0)
        # A channel that never changes, but for rounding, must not be blown up.
        heads.append(Heads(mean, torch.where(std > 1e-5 * mean.abs(), std, 1.0), len(rates), classes))
    optimizer = sgd(heads, rates)
    steps = settings.epochs * math.ceil(len(y) / settings.images_per_step)
    with tqdm(total=steps, desc="linear heads", unit="step", disable=distributed.rank() > 0) as progress:
        for step, rows in enumerate(row_batches(len(y), settings)):
            set_rate(optimizer, step, steps)
            for head, of_choice in zip(heads, x, strict=True):
                loss_of(head(of_choice[rows]), y[rows]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update()
    for head in heads:
        for parameter in head.parameters():
            distributed.broadcast(parameter.data)
    return heads


def train_on_random_crops(
    backbone: Backbone,
    train: LabeledSet,
    choices: Sequence[tuple[int, ...]],
    rates: Sequence[float],
    settings: Settings,
    saved: Path | None,
) -> list[Heads]:
    """Heads on vectors of random crops (scale 0.08 to 1) and flips, new ones in every epoch, as DINO trains them.

    The images of a step are dealt out to the processes, and so is the work.

    Args:
        saved: file that is written after every epoch, and read where it is there.

    Raises:
        ValueError: an unreadable image, or `saved` of other settings.
    """
    device = backbone.model.pos_embed.device
    width = backbone.dim * (2 if settings.pool == "both" else 1)
    heads = [
        Heads(
            torch.zeros(width * len(choice), device=device),
            torch.ones(width * len(choice), device=device),
            len(rates),
            len(train.classes),
        )
        for choice in choices
    ]
    optimizer = sgd(heads, rates)
    # The precision is in the fingerprint.
    matters = {k: v for k, v in plain(settings).items() if k not in (*INCIDENTAL, *LATER)}
    of_images = train.identity or data_sha256(train.places)
    of_labels = hashlib.sha256(train.labels.tobytes()).hexdigest()
    identity = f"{backbone.fingerprint()} {of_images} {of_labels} {matters}"
    begin = load_state(saved, identity, heads, optimizer)
    if len(set(distributed.gather_objects(begin))) > 1:
        raise ValueError(f"{saved} is not the same for all processes: they must see the same --out")
    blocks = sorted({block for choice in choices for block in choice})
    per_epoch = math.ceil(len(train) / settings.images_per_step)
    size = backbone.multiple_below(settings.size)
    rank, processes = distributed.rank(), distributed.world_size()
    with tqdm(
        total=settings.epochs * per_epoch, initial=begin * per_epoch, desc="linear heads", unit="step", disable=rank > 0
    ) as progress:
        for epoch in range(begin, settings.epochs):
            # A step's images of this process, in parts that go through the network together, each read by one worker.
            parts = [
                (
                    len(rows),
                    mine[first : first + settings.batch_size].tolist(),
                    first + settings.batch_size >= len(mine),
                )
                for rows in row_batches(len(train), settings, epoch)
                for mine in [rows[rank::processes]]
                for first in range(0, max(len(mine), 1), settings.batch_size)
            ]
            loader = DataLoader(
                RandomCrops(train, size, settings.seed, epoch),
                batch_sampler=[of_part for _, of_part, _ in parts],
                num_workers=loader_workers(settings.workers, device),
                collate_fn=list,
                worker_init_fn=leave_signals_to_main,
            )
            step = epoch * per_epoch
            for (of_step, _, ends_step), crops in zip(parts, loader, strict=True):
                for crop in crops:
                    if isinstance(crop, str):
                        raise ValueError(crop)
                if crops:
                    y = torch.tensor([label for _, label in crops], device=device)
                    views = backbone.normalize(np.stack([view for view, _ in crops]))
                    found = dict(zip(blocks, backbone.features(views, blocks), strict=True))
                    for head, choice in zip(heads, choices, strict=True):
                        tokens = []
                        if settings.pool in ("cls", "both"):
                            tokens += [found[block].cls for block in choice]
                        if settings.pool in ("mean", "both"):
                            tokens += [found[block].patches.mean((1, 2)) for block in choice]
                        (loss_of(head(torch.cat(tokens, dim=1)), y) * len(crops) / of_step).backward()
                if not ends_step:
                    continue
                for head in heads:
                    for parameter in head.parameters():
                        parameter.grad = distributed.all_reduce_sum(
                            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        )
                set_rate(optimizer, step, settings.epochs * per_epoch)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                progress.update()
            if saved and rank == 0:
                saved.parent.mkdir(parents=True, exist_ok=True)
                state = {
                    "identity": identity,
                    "epoch": epoch + 1,
                    "heads": [head.state_dict() for head in heads],
                    "optimizer": optimizer.state_dict(),
                }
                write_atomically(saved, lambda beside, state=state: torch.save(state, beside))  # type: ignore[misc]
    return heads


def load_state(saved: Path | None, identity: str, heads: list[Heads], optimizer: torch.optim.Optimizer) -> int:
    """Take up what an interrupted run left, and return the epoch to go on with."""
    if saved is None or not saved.exists():
        return 0
    try:
        state = torch.load(saved, map_location=heads[0].mean.device, weights_only=True)
        theirs = state["identity"]
    except Exception as error:  # zip, pickle and key errors
        raise ValueError(f"{saved} is damaged ({type(error).__name__}): delete it, or give another --out") from None
    if theirs != identity:
        raise ValueError(
            f"{saved} is of a run with other settings, weights or images: delete it, or give another --out"
        )
    for head, weights in zip(heads, state["heads"], strict=True):
        head.load_state_dict(weights)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])


class RandomCrops(Dataset):
    """(uint8 [S, S, 3], label): a random crop of image i, flipped or not, the same for the same seed and epoch; for an
    unreadable image, the sentence that says so."""

    def __init__(self, images: LabeledSet, size: int, seed: int, epoch: int):
        self.images, self.size, self.seed, self.epoch = images, size, seed, epoch

    def __getitem__(self, index: int) -> tuple[np.ndarray, int] | str:
        rng = np.random.default_rng((self.seed, self.epoch, index))
        try:
            image = self.images.read(index)
        except (ValueError, OSError) as error:
            return str(error)
        top, left, height, width = crop_box(image.shape[0], image.shape[1], (0.08, 1.0), rng)
        view = resample(image[top : top + height, left : left + width], self.size, self.size)
        return (view[:, ::-1] if rng.random() < 0.5 else view), int(self.images.labels[index])


def sgd(heads: Sequence[Heads], rates: Sequence[float]) -> torch.optim.SGD:
    """DINO's optimizer, each head at its own rate."""
    groups = [
        {"params": [p for head in heads for p in (head.weights[k], head.biases[k])], "lr": rate, "peak": rate}
        for k, rate in enumerate(rates)
    ]
    return torch.optim.SGD(groups, momentum=0.9, weight_decay=0.0)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = cosine(step, steps, group["peak"], 0.0)


def row_batches(count: int, settings: Settings, epoch: int | None = None) -> Iterator[np.ndarray]:
    """Rows of each step, in a new order every epoch; of one epoch, or of all in turn."""
    for number in range(settings.epochs) if epoch is None else (epoch,):
        order = np.random.default_rng((settings.seed, number)).permutation(count)
        for first in range(0, count, settings.images_per_step):
            yield order[first : first + settings.images_per_step]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over heads of the mean cross-entropy: logits [B, heads, C], labels int64 [B]. The heads share no weights."""
    return F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(-1, logits.shape[1])) * logits.shape[1]


@torch.inference_mode()
def predict(head: Heads, x: Tensor) -> np.ndarray:
    """Classes int64 [N, heads] of vectors [N, D]."""
    device = head.mean.device
    return np.concatenate([head(part.to(device)).argmax(-1).cpu().numpy() for part in x.split(4096)])


def choose_rate(head: Heads, x: Tensor, labels: np.ndarray) -> tuple[int, list[float]]:
    """The best of the heads on held-out images, the first of equals, and the accuracy of each."""
    of_rates = (predict(head, x) == labels[:, None]).mean(0)
    return int(of_rates.argmax()), of_rates.tolist()


def protocol_id(settings: Settings, name: str, blocks: tuple[int, ...]) -> str:
    """As in `imagenette-linear/dino`, with every departure from the protocol named behind it."""
    parts = [f"{name}-linear", settings.protocol]
    if settings.pool != "cls":
        parts.append(settings.pool)
    if settings.every_block or settings.blocks != "last4":
        parts.append(name_blocks(blocks))
    if settings.size != 224:
        parts.append(f"{settings.size}px")
    theirs = Settings(ckpt="", data=settings.data)
    changed = any(
        getattr(settings, field) != getattr(theirs, field) for field in ("learning_rates", "epochs", "images_per_step")
    )
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(evaluate, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
