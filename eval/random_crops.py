"""Linear heads on random crops, as DINO trains them (arXiv 2104.14294): all images pass the network in every epoch."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from skipless.common import distributed
from skipless.common.files import save_tensors
from skipless.common.pixels import crop_box, resample
from skipless.common.progress import Progress
from skipless.datasets.labels.classes import LabeledSet
from skipless.eval.classification import Pooling
from skipless.eval.dense.heads import Heads, groups_by_rate, row_batches, set_rates, unfinished_state
from skipless.eval.evaluation import Context
from skipless.eval.features import data_sha256
from skipless.eval.reading import read_batches


class Plan(NamedTuple):
    """How heads are trained on random crops."""

    images_per_step: int
    """Over all processes."""
    epochs: int
    size: int
    """Side in pixels of the crops; one that is no multiple of the patch becomes the one below it."""
    pool: Pooling
    seed: int


class Part(NamedTuple):
    """Images of this process that go through the network together, read by one worker."""

    keys: list[tuple[int, int]]
    """(epoch, image)."""
    step: int
    step_images: int
    """Images of the step over all processes."""
    ends_step: bool
    ends_epoch: bool


def train_on_random_crops(
    context: Context, train: LabeledSet, rates: Sequence[float], plan: Plan, settings: str
) -> list[Heads]:
    """Heads, for each choice of blocks, on vectors of random crops (scale 0.08 to 1) and flips, new ones every epoch.

    The images of a step are dealt out to the processes, and so is the work. Where results are written, head.pt is
    written after every epoch, and an interrupted training goes on from it.

    Args:
        rates: peak learning rates, one head each.
        settings: all that tells this training from another one, but for the backbone and the images.

    Raises:
        ValueError: an unreadable image, or a head.pt of other settings.
    """
    backbone = context.backbone
    heads = []
    for choice in context.choices:
        mean = torch.zeros(backbone.dim * (2 if plan.pool == "both" else 1) * len(choice), device=context.device)
        heads.append(Heads(mean, torch.ones_like(mean), len(rates), len(train.classes)))
    optimizer = sgd(heads, rates)
    saved = context.out / "head.pt" if context.out else None
    labels = hashlib.sha256(train.labels.tobytes()).hexdigest()
    identity = f"{backbone.fingerprint()} {train.identity or data_sha256(train.places)} {labels} {settings}"
    begin = resume(saved, identity, heads, optimizer)
    per_epoch = math.ceil(len(train) / plan.images_per_step)
    total = plan.epochs * per_epoch
    read = partial(read_crop, train, backbone.multiple_below(plan.size), plan.seed)
    # Made twice, since a list of all epochs would fill the memory.
    parts, same = (parts_of_steps(len(train), plan, context.batch_size, begin) for _ in range(2))
    samples = read_batches(read, (part.keys for part in same), context.workers)
    done = begin * per_epoch
    with Progress(total=total, initial=done, desc="linear heads", unit="step", active=context.first) as progress:
        for part, crops in zip(parts, samples, strict=True):
            if crops:
                add_gradients(context, heads, crops, plan.pool, part.step_images)
            if not part.ends_step:
                continue
            sum_gradients(heads)
            set_rates(optimizer, part.step, total)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress.update()
            if part.ends_epoch and saved and context.first:
                save(saved, identity, (part.step + 1) // per_epoch, heads, optimizer)
    return heads


def parts_of_steps(images: int, plan: Plan, batch_size: int, begin: int) -> Iterator[Part]:
    """What this process does from epoch `begin` on."""
    per_epoch = math.ceil(images / plan.images_per_step)
    for epoch in range(begin, plan.epochs):
        for number, rows in enumerate(row_batches(images, plan.images_per_step, [epoch], plan.seed)):
            mine = rows[distributed.rank() :: distributed.world_size()].tolist()
            for first in range(0, max(len(mine), 1), batch_size):
                keys = [(epoch, row) for row in mine[first : first + batch_size]]
                last = first + batch_size >= len(mine)
                yield Part(keys, epoch * per_epoch + number, len(rows), last, last and number == per_epoch - 1)


def read_crop(images: LabeledSet, size: int, seed: int, key: tuple[int, int]) -> tuple[np.ndarray, int]:
    """uint8 [S, S, 3], a random crop, flipped or not, and the label, by (epoch, image); the same for the same seed."""
    epoch, index = key
    rng = np.random.default_rng((seed, epoch, index))
    image = images.read(index)
    top, left, height, width = crop_box(image.shape[0], image.shape[1], (0.08, 1.0), rng)
    view = resample(image[top : top + height, left : left + width], size, size)
    return (view[:, ::-1] if rng.random() < 0.5 else view), int(images.labels[index])


def add_gradients(
    context: Context, heads: Sequence[Heads], crops: list[tuple[np.ndarray, int]], pool: Pooling, step_images: int
) -> None:
    """Add to the heads' gradients those of some crops of a step."""
    y = torch.tensor([label for _, label in crops]).to(context.device, non_blocking=True)
    views = context.backbone.normalize(np.stack([view for view, _ in crops]))
    features = dict(zip(context.blocks, context.backbone.features(views, context.blocks), strict=True))
    for head, choice in zip(heads, context.choices, strict=True):
        tokens = []
        if pool in ("cls", "both"):
            tokens += [features[block].cls for block in choice]
        if pool in ("mean", "both"):
            tokens += [features[block].patches.mean((1, 2)) for block in choice]
        (mean_loss(head(torch.cat(tokens, dim=1)), y) * len(crops) / step_images).backward()


def sum_gradients(heads: Sequence[Heads]) -> None:
    """Over all processes, of which some may have had no image."""
    for head in heads:
        for parameter in head.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = distributed.all_reduce_sum(gradient)


def sgd(heads: Sequence[Heads], rates: Sequence[float]) -> torch.optim.SGD:
    """DINO's optimizer, each head at its own rate."""
    return torch.optim.SGD(groups_by_rate(heads, rates), momentum=0.9, weight_decay=0.0)


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over heads of the mean cross-entropy: logits [B, heads, C], labels int64 [B]. The heads share no weights."""
    return F.cross_entropy(logits.transpose(1, 2), labels[:, None].expand(-1, logits.shape[1])) * logits.shape[1]


def resume(path: Path | None, identity: str, heads: Sequence[Heads], optimizer: torch.optim.Optimizer) -> int:
    """Take up what an interrupted training left, and return the epoch to go on with."""
    state = unfinished_state(path, {"identity": identity})
    begin = int(state["epoch"]) if state else 0
    if len(set(distributed.gather_objects(begin))) > 1:
        raise ValueError(f"{path} is not the same for all processes: they must see the same --out")
    if state:
        for head, weights in zip(heads, state["heads"], strict=True):
            head.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
    return begin


def save(path: Path, identity: str, epoch: int, heads: Sequence[Heads], optimizer: torch.optim.Optimizer) -> None:
    """Write the state after so many epochs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = [head.state_dict() for head in heads]
    state = {"identity": identity, "epoch": epoch, "heads": weights, "optimizer": optimizer.state_dict()}
    save_tensors(path, state)
