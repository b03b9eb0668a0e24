"""Linear segmentation as it is published: a linear head trained on augmented images, over a frozen backbone.

The protocols `mmseg` (DINOv2), `dinov3` and `neco` (Leopart, NeCo, Franca) are recipes of these settings, in
configs/segmentation/. Features are computed anew for every augmented image, so a GPU is the place for this.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from skipless.common.distributed import all_reduce_mean, all_reduce_sum, gather_objects, rank, world_size
from skipless.common.files import write_atomically
from skipless.datasets.labels.masks import VOID, SegmentationSet
from skipless.eval.backbones import Backbone, pad_to_patch
from skipless.eval.dense.augmentation import (
    Library,
    resize_image,
    resize_mask,
    resized_crop,
    scale_and_crop,
    size_within,
)
from skipless.eval.dense.heads import HeadSettings, LinearHeads
from skipless.eval.dense.quick import Outcome, predict, resize_logits
from skipless.eval.dense.windows import by_shape, cut_windows, mean_of_windows
from skipless.eval.metrics import confusion_matrix, image_counts
from skipless.ssl.data.loader import leave_signals_to_main

SAVE_EVERY = 500  # iterations


@dataclass
class AugmentationSettings:
    """How training images are cut and changed."""

    kind: Literal["scale_crop", "resized_crop"] = "scale_crop"
    """scale_crop: mmsegmentation's resize by a random factor, crop and pad. resized_crop: torchvision's."""
    size: int = 512
    """Side of the crop in pixels."""
    flip: float = 0.5
    """Share of the crops that are mirrored."""
    scale: tuple[int, int] = (2048, 512)
    """scale_crop: images are resized to within this long and short side, times a random factor."""
    ratio: tuple[float, float] = (0.5, 2.0)
    """scale_crop: range of the factor."""
    max_class_share: float = 0.75
    """scale_crop: crops in which one class has this share of the labeled pixels or more are drawn again, up to ten
    times; 1 takes any crop."""
    photometric: bool = True
    """scale_crop: mmsegmentation's photometric distortion."""
    area: tuple[float, float] = (0.8, 1.0)
    """resized_crop: range of the crop's area, as a share of the image's."""

    def __post_init__(self) -> None:
        if min(self.size, *self.scale) < 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError("training.augmentation: size, scale and ratio must be positive, and ratio must rise")
        if not 0 < self.area[0] <= self.area[1] <= 1:
            raise ValueError(f"training.augmentation.area is {self.area}; it must be two rising shares in (0, 1]")


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
class InferenceSettings:
    """How predictions are made and compared."""

    kind: Literal["windows", "square"] = "windows"
    """windows: sliding window on the image resized to within `scale`; logits resized to the original label. square: the
    image resized to a square; logits and labels compared on a `grid` x `grid` raster."""
    scale: tuple[int, int] = (2048, 512)
    """windows: long and short side that images are resized to fit in."""
    window: int = 512
    """windows: its side in pixels."""
    stride: int = 341
    """windows: pixels from one to the next."""
    size: int = 448
    """square: side of the image in pixels."""
    grid: int = 100
    """square: side of the raster on which logits and labels are compared."""

    def __post_init__(self) -> None:
        if min(self.window, self.size, self.grid, *self.scale) < 1:
            raise ValueError("training.inference: scale, window, size and grid must be 1 or more")
        if not 0 < self.stride <= self.window:
            raise ValueError(
                f"training.inference.stride is {self.stride}; it must be 1 to the window's side, {self.window}"
            )


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
    backbone: Backbone,
    train: SegmentationSet,
    val: SegmentationSet,
    choices: Sequence[tuple[int, ...]],
    settings: TrainingSettings,
    seed: int,
    batch_size: int,
    workers: int,
    shown: Sequence[int],
    out: Path | None,
) -> Outcome:
    """Run the protocol: train a head for each choice of blocks, all in one pass, and score them on `val`.

    With `out`, its state is kept in `out`/unfinished.pt, from which the same call continues, and the heads are left in
    `out`/head.pt.

    Raises:
        ValueError: settings that contradict each other or the data, unreadable images, or a loss that is not finite.
    """
    device = backbone.model.pos_embed.device
    torch.manual_seed(seed)
    heads = LinearHeads(backbone.dim, len(train.classes), choices, settings.head).to(device)
    total = train_heads(heads, backbone, train, settings, seed, workers, out)
    confusions, counts, predictions = score_heads(heads, backbone, val, settings, batch_size, workers, shown)
    if out and rank() == 0:
        state = {name: tensor.cpu() for name, tensor in heads.state_dict().items()}
        write_atomically(out / "head.pt", lambda beside: torch.save(state, beside))
        (out / "unfinished.pt").unlink(missing_ok=True)
    return Outcome(confusions, counts, predictions, {"iterations": total, "train_images": len(train)})


def train_heads(
    heads: LinearHeads,
    backbone: Backbone,
    train: SegmentationSet,
    settings: TrainingSettings,
    seed: int,
    workers: int,
    out: Path | None,
) -> int:
    """Train heads in place and return the number of iterations."""
    optimizer_settings = settings.optimizer
    total = _length(optimizer_settings, len(train))
    per_epoch = max(1, len(train) // optimizer_settings.batch_size)
    device = backbone.model.pos_embed.device
    model: nn.Module = heads
    if world_size() > 1:
        model = DistributedDataParallel(heads, [device] if device.type == "cuda" else None, broadcast_buffers=False)
    parameters, chosen = heads.parameters(), optimizer_settings
    optimizer: torch.optim.Optimizer
    if chosen.name == "adamw":
        optimizer = torch.optim.AdamW(parameters, chosen.lr, chosen.betas, weight_decay=chosen.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, chosen.lr, chosen.momentum, weight_decay=chosen.weight_decay)
    identity = {
        "settings": repr(settings),
        "seed": seed,
        "choices": repr(heads.choices),
        "data": hashlib.sha256(repr((train.name, train.names)).encode()).hexdigest(),
        "checkpoint": backbone.fingerprint(),
    }
    start = _resume(out, identity, heads, optimizer)
    loader = DataLoader(
        _Augmented(train, settings, seed),
        batch_sampler=_Iterations(len(train), chosen.batch_size, chosen.iterations is None, seed, start, total),
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_main,
    )
    heads.train()
    with tqdm(total=total, initial=start, desc="head", unit="step", disable=rank() > 0) as progress:
        for iteration, samples in enumerate(loader, start):
            images, masks = _collate(samples, backbone)
            for group in optimizer.param_groups:
                group["lr"] = chosen.lr * rate(chosen, iteration, total, per_epoch)
            torch.manual_seed((seed * total + iteration) * world_size() + rank())  # of the dropout
            size = (settings.inference.grid,) * 2 if settings.inference.kind == "square" else tuple(masks.shape[1:])
            target = _nearest(masks, size)
            # Over all processes, which hold differently many: the mean is that of the whole batch.
            labeled = all_reduce_mean((target != VOID).sum().float()).clamp(min=1)
            features = _features(backbone, images, heads.choices)
            loss = torch.zeros((), device=device)
            for logits in model(features):
                losses = F.cross_entropy(resize_logits(logits, size), target, ignore_index=VOID, reduction="sum")
                loss = loss + losses / labeled
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            done = iteration + 1
            if done % 50 == 0 or done == total:
                value = loss.item()
                if not math.isfinite(value):
                    finite = all(bool(x.isfinite().all()) for x in features.values())
                    advice = "lower training.optimizer.lr" if finite else _not_finite(backbone)
                    raise ValueError(f"the head's loss is {value} at iteration {done}: {advice}")
                progress.set_postfix(loss=f"{value / len(heads.choices):.3f}")
            if out and rank() == 0 and done % SAVE_EVERY == 0:
                state = {
                    "iteration": done,
                    "heads": heads.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    **identity,
                }
                write_atomically(out / "unfinished.pt", lambda beside, state=state: torch.save(state, beside))  # type: ignore[misc]
            progress.update()
    return total


@torch.inference_mode()
def score_heads(
    heads: LinearHeads,
    backbone: Backbone,
    images: SegmentationSet,
    settings: TrainingSettings,
    batch_size: int,
    workers: int,
    shown: Sequence[int],
) -> tuple[Tensor, Tensor, dict[int, np.ndarray]]:
    """Confusion matrices [choices, C, C] over a data set; `image_counts` of every image [choices, N, 3, C]; the last
    choice's predictions for the images `shown`.

    Of `batch_size` images that are read together, the windows of one size go through the backbone together, at most
    `batch_size` of them. The figures do not depend on it but by rounding.
    """
    heads.eval()
    device = backbone.model.pos_embed.device
    classes = len(images.classes)
    confusions = torch.zeros(len(heads.choices), classes, classes, dtype=torch.int64, device=device)
    counts = torch.zeros(len(heads.choices), len(images), 3, classes, dtype=torch.int64, device=device)
    predictions = {}
    inference = settings.inference
    mine = list(range(rank(), len(images), world_size()))
    batches = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
    loader = DataLoader(
        _Resized(images, settings),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_main,
    )
    with tqdm(total=len(mine), desc=f"{images.name} {images.split}", unit="image", disable=rank() > 0) as progress:
        for batch, samples in zip(batches, loader, strict=True):
            for sample in samples:
                if isinstance(sample, str):
                    raise ValueError(sample)
            pictures = [backbone.normalize(picture[None])[0] for picture, _ in samples]
            logits = _logits_of_patches(heads, backbone, pictures, inference, batch_size)
            finite = torch.stack([of_image.isfinite().all() for of_image in logits])
            if not finite.all():
                raise ValueError(f"{images.images[batch[int(finite.int().argmin())]]}: {_not_finite(backbone)}")
            for index, picture, (_, mask), of_image in zip(batch, pictures, samples, logits, strict=True):
                truth = torch.from_numpy(mask).to(device).long()
                if inference.kind == "square":
                    truth = _nearest(truth[None], (inference.grid, inference.grid))[0]
                # Choice by choice, since those of all choices at the size of the image would fill the memory.
                for number, of_choice in enumerate(of_image.unbind(1)):
                    prediction = predict(_merged(of_choice, picture, inference), truth.shape)
                    confusion = confusion_matrix(truth, prediction, classes)
                    confusions[number] += confusion
                    counts[number, index] = image_counts(confusion)
                if index in shown:
                    predictions[index] = prediction.to(torch.uint8).cpu().numpy()
                progress.update()
    gathered = gather_objects(predictions)
    shown_predictions = {index: p for part in gathered for index, p in part.items()}
    return all_reduce_sum(confusions), all_reduce_sum(counts), shown_predictions


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


def _length(settings: OptimizerSettings, images: int) -> int:
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


def _features(backbone: Backbone, images: Tensor, choices: Sequence[tuple[int, ...]]) -> dict[int, Tensor]:
    """[B, D, h, w] by block. What the patch does not divide is padded all around, as DINOv2 does."""
    blocks = sorted({block for choice in choices for block in choice})
    found = backbone.features(pad_to_patch(images, backbone.patch, centered=True), blocks)
    return {block: f.patches.permute(0, 3, 1, 2) for block, f in zip(blocks, found, strict=True)}


def _logits_of_patches(
    heads: LinearHeads, backbone: Backbone, pictures: Sequence[Tensor], inference: InferenceSettings, batch_size: int
) -> list[Tensor]:
    """For each picture [3, H, W] the logits of the patches of its windows, [windows, choices, C, h, w]; a square is one
    window."""
    if inference.kind == "windows":
        windows = [cut_windows(picture, inference.window, inference.stride) for picture in pictures]
    else:
        windows = [[picture] for picture in pictures]

    def network(crops: Tensor) -> Tensor:
        return torch.stack(heads(_features(backbone, crops, heads.choices)), 1)

    found = iter(by_shape(network, [window for of_picture in windows for window in of_picture], batch_size))
    return [torch.stack([next(found) for _ in of_picture]) for of_picture in windows]


def _merged(parts: Tensor, picture: Tensor, inference: InferenceSettings) -> Tensor:
    """Logits [C, H, W] of a picture [3, H, W] from those of its windows' patches [windows, C, h, w]; of a square's, the
    only ones, as they are."""
    if inference.kind == "square":
        return parts[0]
    height, width = picture.shape[1:]
    parts = resize_logits(parts, (min(height, inference.window), min(width, inference.window)))
    return mean_of_windows(parts, height, width, inference.window, inference.stride)


def _not_finite(backbone: Backbone) -> str:
    return f"features of {backbone.path} are NaN or infinite; check the checkpoint, or take other blocks"


def _nearest(masks: Tensor, size: Sequence[int]) -> Tensor:
    """int64 labels at another size, by nearest neighbour."""
    if tuple(masks.shape[1:]) == tuple(size):
        return masks
    return F.interpolate(masks[:, None].float(), tuple(size), mode="nearest")[:, 0].long()


def _resume(out: Path | None, identity: dict[str, Any], heads: LinearHeads, optimizer: torch.optim.Optimizer) -> int:
    path = out / "unfinished.pt" if out else None
    if path is None or not path.exists():
        return 0
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its parsers raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): delete it to start anew") from None
    if any(state.get(key) != value for key, value in identity.items()):
        raise ValueError(f"{path} is of an evaluation with other settings: delete it, or give another --out")
    heads.load_state_dict(state["heads"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["iteration"])


def _collate(samples: list[Any], backbone: Backbone) -> tuple[Tensor, Tensor]:
    """Normalised images [B, 3, S, S], zero where they are padded, and int64 masks [B, S, S]."""
    for sample in samples:
        if isinstance(sample, str):
            raise ValueError(sample)
    images = backbone.normalize(np.stack([image for image, _, _ in samples]))
    inside = torch.from_numpy(np.stack([where for _, _, where in samples])).to(images.device)
    masks = torch.from_numpy(np.stack([mask for _, mask, _ in samples])).long().to(images.device)
    return images * inside[:, None], masks


class _Iterations(Sampler[list[tuple[int, int, int]]]):
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


class _Augmented(Dataset):
    """Crops: uint8 [S, S, 3], uint8 [S, S], bool [S, S] (where the image is); or the sentence on an unreadable one."""

    def __init__(self, images: SegmentationSet, settings: TrainingSettings, seed: int):
        self.images, self.settings, self.seed = images, settings, seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | str:
        iteration, position, index = key
        try:
            image, mask = self.images.read(index)
        except (ValueError, OSError) as error:
            return str(error)
        rng = np.random.default_rng((self.seed, iteration, position))
        a, resize = self.settings.augmentation, self.settings.resize
        if a.kind == "scale_crop":
            return scale_and_crop(
                image, mask, rng, a.scale, a.ratio, a.size, a.max_class_share, a.flip, a.photometric, resize
            )
        image, mask = resized_crop(image, mask, rng, a.size, a.area, a.flip, resize)
        return image, mask, np.ones(mask.shape, bool)


class _Resized(Dataset):
    """Images as inference wants them, with the mask they are compared to; or the sentence on an unreadable one."""

    def __init__(self, images: SegmentationSet, settings: TrainingSettings):
        self.images, self.settings = images, settings

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray] | str:
        inference = self.settings.inference
        try:
            image, mask = self.images.read(index)
        except (ValueError, OSError) as error:
            return str(error)
        if inference.kind == "windows":
            height, width = size_within(mask.shape[0], mask.shape[1], *inference.scale)
            return resize_image(image, height, width, self.settings.resize), mask
        side = inference.size
        return resize_image(image, side, side, self.settings.resize), resize_mask(mask, side, side)
