"""Linear segmentation as it is published: a linear head trained on augmented images, over a frozen backbone.

The protocols `mmseg` (DINOv2), `dinov3` and `neco` (Leopart, NeCo, Franca) are recipes of these settings, in
configs/segmentation/. Features are computed anew for every augmented image, so a GPU is the place for this.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler

from skipless.common.distributed import all_reduce_mean, rank, world_size
from skipless.common.files import save_tensors
from skipless.common.progress import Progress
from skipless.datasets.labels.masks import VOID, SegmentationSet
from skipless.eval.backbones import Backbone
from skipless.eval.dense.augmentation import AugmentationSettings, Library, augment
from skipless.eval.dense.heads import HeadSettings, LinearHeads, unfinished_state
from skipless.eval.dense.inference import InferenceSettings, features_of, nearest_labels, not_finite, score_heads
from skipless.eval.dense.labels import resize_logits
from skipless.eval.dense.outcome import Outcome
from skipless.eval.evaluation import Context
from skipless.eval.reading import read_batches

SAVE_EVERY = 500  # iterations


@dataclass
class OptimizerSettings:
    """How the head is trained."""

    name: Literal["adamw", "sgd"] = "adamw"
    """AdamW or SGD."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-4
    """Decoupled in AdamW, added to the gradient in SGD."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    momentum: float = 0.9
    """Of SGD."""
    schedule: Literal["polynomial", "one_cycle", "step"] = "polynomial"
    """polynomial: to 0, with `power`. one_cycle: half a cosine to 0. step: times `drop_factor` from `drop_epoch` on."""
    power: float = 1.0
    """polynomial: the exponent; 1 is a straight line."""
    warmup: int = 1500
    """polynomial, one_cycle: iterations of linear warm-up."""
    warmup_start: float = 1e-6
    """polynomial, one_cycle: the warm-up starts at this share of the schedule."""
    drop_epoch: int = 20
    """step: when the learning rate drops, in epochs from 0."""
    drop_factor: float = 0.1
    """step: by what."""
    batch_size: int = 16
    """Images in a step, over all processes."""
    iterations: int | None = 40000
    """Length in steps, or None, for a length in epochs."""
    epochs: int | None = None
    """Length in passes over the training set, whose incomplete last batches are left out, if iterations is None."""


@dataclass
class TrainingSettings:
    """A protocol that trains its head on augmented images."""

    head: HeadSettings = field(default_factory=HeadSettings)
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    inference: InferenceSettings = field(default_factory=InferenceSettings)
    resize: Library = "opencv"
    """Library that resizes images bilinearly: opencv does not antialias (mmsegmentation), pillow does."""


def train_and_evaluate(
    context: Context,
    train: SegmentationSet,
    val: SegmentationSet,
    settings: TrainingSettings,
    seed: int,
    shown: Sequence[int] = (),
) -> Outcome:
    """Run the protocol: train a head for each of the context's choices of blocks, all in one pass, and score them on
    `val`.

    Where results are written, the state is kept in unfinished.pt, from which the same call continues, and the heads are
    left in head.pt.

    Raises:
        ValueError: settings that contradict each other or the data, unreadable images, or a loss that is not finite.
    """
    torch.manual_seed(seed)
    heads = LinearHeads(context.backbone.dim, len(train.classes), context.choices, settings.head).to(context.device)
    total = train_heads(context, heads, train, settings, seed)
    outcome = score_heads(context, heads, val, settings.inference, settings.resize, shown)
    if context.out and context.first:
        state = {name: tensor.cpu() for name, tensor in heads.state_dict().items()}
        context.out.mkdir(parents=True, exist_ok=True)
        save_tensors(context.out / "head.pt", state)
        (context.out / "unfinished.pt").unlink(missing_ok=True)
    outcome.details = {"iterations": total, "train_images": len(train)}
    return outcome


def train_heads(
    context: Context, heads: LinearHeads, train: SegmentationSet, settings: TrainingSettings, seed: int
) -> int:
    """Train heads in place and return the number of iterations."""
    backbone, device, chosen = context.backbone, context.device, settings.optimizer
    total = training_length(chosen, len(train))
    per_epoch = max(1, len(train) // chosen.batch_size)
    model: nn.Module = heads
    if world_size() > 1:
        model = DistributedDataParallel(heads, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    optimizer = make_optimizer(heads, chosen)
    identity = {
        "settings": repr(settings),
        "seed": seed,
        "choices": repr(heads.choices),
        "data": hashlib.sha256(repr((train.name, train.names)).encode()).hexdigest(),
        "checkpoint": backbone.fingerprint(),
    }
    saved = context.out / "unfinished.pt" if context.out else None
    start = resume(saved, identity, heads, optimizer)
    keys = StepKeys(len(train), chosen.batch_size, chosen.iterations is None, seed, start, total)
    batches = read_batches(partial(read_crop, train, settings, seed), keys, context.workers)
    heads.train()
    with Progress(total=total, initial=start, desc="head", unit="step", active=rank() == 0) as progress:
        for iteration, samples in enumerate(batches, start):
            images, masks = collate(samples, backbone)
            for group in optimizer.param_groups:
                group["lr"] = chosen.lr * rate(chosen, iteration, total, per_epoch)
            torch.manual_seed((seed * total + iteration) * world_size() + rank())  # of the dropout
            features = features_of(backbone, images, heads.choices)
            loss = loss_of(model(features), masks, settings.inference)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done = iteration + 1
            if done % 50 == 0 or done == total:
                value = finite_loss(loss, features, done, backbone)
                progress.set_postfix(loss=f"{value / len(heads.choices):.3f}")
            if saved and context.first and done % SAVE_EVERY == 0:
                parts = {"heads": heads.state_dict(), "optimizer": optimizer.state_dict()}
                saved.parent.mkdir(parents=True, exist_ok=True)
                save_tensors(saved, {"iteration": done, **parts, **identity})
            progress.update()
    return total


def make_optimizer(heads: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """AdamW or SGD over all parameters."""
    parameters, decay = heads.parameters(), settings.weight_decay
    if settings.name == "adamw":
        return torch.optim.AdamW(parameters, settings.lr, settings.betas, weight_decay=decay)
    return torch.optim.SGD(parameters, settings.lr, settings.momentum, weight_decay=decay)


def loss_of(logits: Sequence[Tensor], masks: Tensor, inference: InferenceSettings) -> Tensor:
    """Mean cross-entropy of the labeled pixels, summed over heads, at the size at which labels are compared.

    Args:
        logits: of each head [B, C, h, w].
        masks: int64 [B, S, S].
    """
    size = (inference.grid,) * 2 if inference.kind == "square" else tuple(masks.shape[1:])
    target = nearest_labels(masks, size)
    # Over all processes, which hold differently many: the mean is that of the whole batch.
    labeled = all_reduce_mean((target != VOID).sum().float()).clamp(min=1)
    loss = torch.zeros((), device=masks.device)
    for parts in logits:
        losses = F.cross_entropy(resize_logits(parts, size), target, ignore_index=VOID, reduction="sum")
        loss = loss + losses / labeled
    return loss


def finite_loss(loss: Tensor, features: dict[int, Tensor], iteration: int, backbone: Backbone) -> float:
    """The loss as a number. Raises ValueError where it is none."""
    value = loss.item()
    if not math.isfinite(value):
        finite = all(bool(x.isfinite().all()) for x in features.values())
        advice = "lower training.optimizer.lr" if finite else not_finite(backbone)
        raise ValueError(f"the head's loss is {value} at iteration {iteration}: {advice}")
    return value


def resume(path: Path | None, identity: dict[str, Any], heads: LinearHeads, optimizer: torch.optim.Optimizer) -> int:
    """Load what an interrupted training left, and return the iteration to go on with."""
    state = unfinished_state(path, identity)
    if state is None:
        return 0
    heads.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["iteration"])


def rate(settings: OptimizerSettings, iteration: int, total: int, per_epoch: int) -> float:
    """The learning rate of an iteration (from 0), as a share of the peak.

    Polynomial with linear warm-up: mmcv's `poly` and `warmup="linear"`, the warm-up being a factor on the schedule.
    One-cycle: DINOv3's WarmupOneCycleLR with pct_start 0, whose warm-up is a factor on a straight line.
    """
    if settings.schedule == "step":
        return settings.drop_factor if iteration // per_epoch >= settings.drop_epoch else 1.0
    warming = 1.0
    if iteration < settings.warmup:
        warming = 1 - (1 - iteration / settings.warmup) * (1 - settings.warmup_start)
    if settings.schedule == "polynomial":
        return warming * (1 - iteration / total) ** settings.power
    if iteration < settings.warmup:
        return warming * (1 - iteration / total)
    return 0.5 * (1 + math.cos(math.pi * (iteration + 1) / total))


def training_length(settings: OptimizerSettings, images: int) -> int:
    if settings.batch_size < 1 or settings.batch_size % world_size():
        raise ValueError(
            f"training.optimizer.batch_size is {settings.batch_size}; it must be a multiple of the number of "
            f"processes, {world_size()}"
        )
    length, unit = (settings.epochs, "epochs") if settings.iterations is None else (settings.iterations, "iterations")
    if length is None or None not in (settings.iterations, settings.epochs):
        raise ValueError("training.optimizer takes either iterations or epochs; set one of them, the other to null")
    if length < 1:
        raise ValueError(f"training.optimizer.{unit} is {length}; it must be 1 or more")
    total = length
    if settings.iterations is None:
        if images < settings.batch_size:
            raise ValueError(
                f"training.optimizer.batch_size is {settings.batch_size}, and there are {images} training images; "
                "lower it"
            )
        total = length * (images // settings.batch_size)
    if settings.schedule != "step" and settings.warmup >= total:
        raise ValueError(
            f"training.optimizer.warmup is {settings.warmup} of {total} iterations: lower it, or the learning rate "
            "never reaches its peak"
        )
    return total


def collate(samples: list[Any], backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Normalized images [B, 3, S, S], zero where they are padded, and int64 masks [B, S, S]."""
    images = backbone.normalize(np.stack([image for image, _, _ in samples]))
    inside, masks = (
        torch.from_numpy(np.stack(arrays)).to(images.device, non_blocking=True)
        for arrays in ([where for _, _, where in samples], [mask for _, mask, _ in samples])
    )
    return images * inside[:, None], masks.long()


def read_crop(
    images: SegmentationSet, settings: TrainingSettings, seed: int, key: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The crop of a key (iteration, position in the batch, image); see `augment`."""
    iteration, position, index = key
    image, mask = images.read(index)
    rng = np.random.default_rng((seed, iteration, position))
    return augment(image, mask, rng, settings.augmentation, settings.resize)


class StepKeys(Sampler[list[tuple[int, int, int]]]):
    """Keys (iteration, position in the batch, image) of this process's part of every step.

    The images go round in ever new permutations; by epochs, what is left at the end of one is dropped. What a step sees
    does not depend on the number of processes, and any step can be started from.
    """

    def __init__(self, images: int, batch: int, by_epochs: bool, seed: int, start: int, total: int):
        self.images, self.batch, self.seed, self.start, self.total = images, batch, seed, start, total
        self.round = images // batch * batch if by_epochs else images

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        share = self.batch // world_size()
        orders: dict[int, np.ndarray] = {}
        for iteration in range(self.start, self.total):
            keys = []
            for position in range(rank() * share, (rank() + 1) * share):
                epoch, place = divmod(iteration * self.batch + position, self.round)
                if epoch not in orders:
                    orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                    orders[epoch] = np.random.default_rng((self.seed, epoch)).permutation(self.images)
                keys.append((iteration, position, int(orders[epoch][place])))
            yield keys
