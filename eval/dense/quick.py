"""Linear segmentation in minutes on a CPU: features of every image once, then many linear heads on them in one pass.

1. Images, resized to squares of a fixed size, go through the frozen backbone once; features are kept on disk.
2. For every choice of blocks and every learning rate a linear classifier of patches is trained, all in one pass over
   the features: standardised by their mean and standard deviation over the training set, AdamW, cosine schedule. The
   loss is the mean cross-entropy of all labeled pixels, a pixel having the logits of its patch: as these are equal
   within a patch, what the loss needs of the labels is the share of each class in it.
3. A tenth of the training images, evenly spread, is held out, and chooses the learning rate.
4. Logits are resized bilinearly to the original label, and every pixel counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skipless.common.distributed import all_reduce_sum, broadcast, gather_objects, rank, world_size
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.backbones import Backbone
from skipless.eval.features import Features, extract
from skipless.eval.metrics import confusion_matrix, image_counts, segmentation_scores
from skipless.ssl.data.loader import leave_signals_to_main
from skipless.ssl.optim.schedules import cosine


class Outcome(NamedTuple):
    """What an evaluation found."""

    confusions: Tensor
    """int64 [choices of blocks, C, C], summed over the data set and over processes."""
    counts: Tensor
    """int64 [choices of blocks, N, 3, C], `image_counts` of every image."""
    predictions: dict[int, np.ndarray]
    """uint8 [H, W] of some images of the set, by the heads on the last choice of blocks."""
    details: dict[str, Any]


@dataclass
class QuickSettings:
    """The protocol `quick`."""

    size: int = 448
    """Side in pixels of the squares that images are resized to. For a patch that does not divide it, the multiple of
    the patch below it is used."""
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2)
    """One head is trained with each; the held-out images choose."""
    weight_decay: float = 1e-4
    """Of AdamW."""
    epochs: int = 20
    """Passes over the training features."""
    images_per_step: int = 16
    """Images whose patches make a batch."""
    max_images: int = 3000
    """At most so many training images are used, evenly spread over the set: their labels are kept in memory."""

    def __post_init__(self) -> None:
        if min(self.size, self.epochs, self.images_per_step) < 1 or self.max_images < 2:
            raise ValueError(
                "quick.size, quick.epochs and quick.images_per_step must be 1 or more, max_images 2 or more"
            )
        if not self.learning_rates or min(self.learning_rates) <= 0 or self.weight_decay < 0:
            raise ValueError("quick.learning_rates must be positive, and quick.weight_decay not negative")


def quick(
    backbone: Backbone,
    train: SegmentationSet,
    val: SegmentationSet,
    choices: Sequence[tuple[int, ...]],
    settings: QuickSettings,
    cache: Path,
    seed: int,
    batch_size: int,
    workers: int,
    shown: Sequence[int],
) -> Outcome:
    """Run the protocol.

    Args:
        choices: blocks (from 0) whose features are concatenated; one set of heads for each choice.
        cache: folder for features.
        batch_size: images in one forward pass of the backbone.
        shown: images of `val` whose prediction is wanted, by the last of the choices.

    Raises:
        ValueError: fewer than two training images, or unreadable or damaged ones.
    """
    size = max(settings.size // backbone.patch, 1) * backbone.patch
    blocks = sorted({block for choice in choices for block in choice})
    train_rows = _spread(len(train), settings.max_images)
    if len(train_rows) < 2:
        raise ValueError(f"{train.name} {train.split} has one image; quick needs two or more, one of them held out")

    def features_of(images: SegmentationSet, rows: np.ndarray) -> Features:
        paths = [images.images[row] for row in rows]
        read = partial(_image_of_row, images, rows)
        title = f"features, {images.split}"
        return extract(backbone, paths, read, size, blocks, cache, "tokens", batch_size, workers, title)

    train_features = features_of(train, train_rows)
    val_features = features_of(val, np.arange(len(val)))
    held_out = np.arange(len(train_rows)) % 10 == 9 if len(train_rows) >= 10 else np.arange(len(train_rows)) == 0
    kept = np.flatnonzero(~held_out)

    shares = _all_label_shares(train, train_rows[kept], train_features.grid, workers)
    heads = _train(backbone, train_features, kept, shares, choices, settings, seed)
    confusions, _, _ = _evaluate(
        heads, train_features, train, np.flatnonzero(held_out), train_rows, choices, "choosing", []
    )
    rates = len(settings.learning_rates)
    found = [
        [segmentation_scores(c).miou for c in confusions[i * rates : (i + 1) * rates]] for i in range(len(choices))
    ]
    best = [int(np.nanargmax(of_choice)) for of_choice in found]
    chosen = [head.only(rate) for head, rate in zip(heads, best, strict=True)]
    rows = np.arange(len(val))
    confusions, counts, predictions = _evaluate(
        chosen, val_features, val, rows, rows, choices, f"{val.name} {val.split}", shown
    )
    details = {
        "image_size": size,
        "train_images": len(kept),
        "held_out_images": int(held_out.sum()),
        "learning_rates": [settings.learning_rates[rate] for rate in best],
        "held_out_miou": found,
    }
    return Outcome(confusions, counts, predictions, details)


class Heads(nn.Module):
    """Linear classifiers of standardised patch features [P, D], one for each learning rate."""

    def __init__(self, mean: Tensor, std: Tensor, count: int, classes: int):
        super().__init__()
        self.mean, self.std, self.classes = mean, std, classes
        self.weights = nn.ParameterList(torch.zeros(len(mean), classes, device=mean.device) for _ in range(count))
        self.biases = nn.ParameterList(torch.zeros(classes, device=mean.device) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[P, D] -> logits [P, heads, C]."""
        # Standardisation goes into the weights, which are few, and not over the features, which are many.
        weight = torch.cat(list(self.weights), dim=1) / self.std[:, None]
        bias = torch.cat(list(self.biases)) - self.mean @ weight
        return torch.addmm(bias, x.float(), weight).unflatten(1, (-1, self.classes))

    def only(self, head: int) -> "Heads":
        """One of the heads, alone."""
        alone = Heads(self.mean, self.std, 1, self.classes)
        alone.load_state_dict({"weights.0": self.weights[head].data, "biases.0": self.biases[head].data})
        return alone


def label_shares(mask: np.ndarray, h: int, w: int, classes: int) -> np.ndarray:
    """The share of each class in the patches of an h x w grid laid over a mask.

    Args:
        mask: uint8 [H, W]; values from `classes` on are ignored. A pixel belongs to the patch its centre lies in.

    Returns:
        float32 [h, w, classes]; the shares of a patch add up to the share of its pixels that are labeled.
    """
    rows = (2 * np.arange(mask.shape[0]) + 1) * h // (2 * mask.shape[0])
    columns = (2 * np.arange(mask.shape[1]) + 1) * w // (2 * mask.shape[1])
    patch = rows[:, None] * w + columns
    labeled = mask < classes
    counts = np.bincount(patch[labeled] * classes + mask[labeled], minlength=h * w * classes)
    # A mask smaller than the grid leaves some patches without a pixel.
    pixels = np.maximum(np.bincount(patch.ravel(), minlength=h * w), 1)
    return (counts.reshape(h, w, classes) / pixels.reshape(h, w, 1)).astype(np.float32)


def _train(
    backbone: Backbone,
    features: Features,
    rows: np.ndarray,
    shares: Tensor,
    choices: Sequence[tuple[int, ...]],
    settings: QuickSettings,
    seed: int,
) -> list[Heads]:
    """Heads for every choice of blocks, trained together. Each process trains them all and takes those of the first."""
    device = backbone.model.pos_embed.device
    classes = shares.shape[-1]
    heads = [
        Heads(*_mean_and_std(features, rows, choice, device), len(settings.learning_rates), classes)
        for choice in choices
    ]
    groups = [
        {"params": [p for head in heads for p in (head.weights[k], head.biases[k])], "lr": rate, "peak": rate}
        for k, rate in enumerate(settings.learning_rates)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    steps_per_epoch = -(-len(rows) // settings.images_per_step)
    total = settings.epochs * steps_per_epoch
    with tqdm(
        total=total, desc=f"{len(heads) * len(groups)} linear heads", unit="step", disable=rank() > 0
    ) as progress:
        step = 0
        for epoch in range(settings.epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(rows))
            for first in range(0, len(rows), settings.images_per_step):
                for group in optimizer.param_groups:
                    group["lr"] = cosine(step, total, group["peak"], 0.0)
                batch = order[first : first + settings.images_per_step]
                target = shares[batch].to(device).flatten(0, 2).float()  # [P, C]
                for choice, head in zip(choices, heads, strict=True):
                    x = features.read(rows[batch], choice).to(device).flatten(0, 2)
                    log_p = head(x).log_softmax(-1)  # [P, heads, C]
                    loss = -(target * log_p.sum(1)).sum() / target.sum().clamp(min=1e-6)
                    loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step += 1
                progress.update()
    for head in heads:
        for parameter in head.parameters():
            broadcast(parameter.data)
    return heads


@torch.inference_mode()
def _evaluate(
    heads: Sequence[Heads],
    features: Features,
    images: SegmentationSet,
    rows: np.ndarray,
    image_of_row: np.ndarray,
    choices: Sequence[tuple[int, ...]],
    title: str,
    shown: Sequence[int],
) -> tuple[Tensor, Tensor, dict[int, np.ndarray]]:
    """Confusion matrices [choices * heads, C, C] over some rows of `features`; `image_counts` of each row [choices *
    heads, rows, 3, C]; predictions of the images `shown`."""
    device = heads[0].mean.device
    classes = len(images.classes)
    confusions = torch.zeros(
        sum(len(head.weights) for head in heads), classes, classes, dtype=torch.int64, device=device
    )
    counts = torch.zeros(len(confusions), len(rows), 3, classes, dtype=torch.int64, device=device)
    predictions = {}
    mine = range(rank(), len(rows), world_size())
    for position in tqdm(mine, desc=title, unit="image", disable=rank() > 0):
        row = int(rows[position])
        index = int(image_of_row[row])
        mask = torch.from_numpy(images.read_matched_mask(index)).to(device)
        number = 0
        for choice, head in zip(choices, heads, strict=True):
            logits = head(features.read([row], choice).to(device)[0].flatten(0, 1))  # [P, heads, C]
            for of_head in logits.unbind(1):
                grid = of_head.T.unflatten(1, features.grid)
                prediction = predict(grid, mask.shape)
                confusion = confusion_matrix(mask, prediction, classes)
                confusions[number] += confusion
                counts[number, position] = image_counts(confusion)
                number += 1
        if index in shown:
            predictions[index] = prediction.to(torch.uint8).cpu().numpy()
    gathered = gather_objects(predictions)
    shown_predictions = {index: p for part in gathered for index, p in part.items()}
    return all_reduce_sum(confusions), all_reduce_sum(counts), shown_predictions


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """[B, C, h, w] -> [B, C, *size], bilinear with half-pixel centres (align_corners=False), as in all protocols."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)


def predict(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Class of every pixel, int64 of shape `size`, from logits [C, h, w] by `resize_logits`."""
    # Over the first dimension argmax takes six times as long on a CPU.
    return resize_logits(logits[None], size)[0].max(0).indices


def _mean_and_std(
    features: Features, rows: np.ndarray, choice: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 [D] each, over all patches of some rows."""
    total = torch.zeros(2, features.dim * len(choice), dtype=torch.float64, device=device)
    for first in range(0, len(rows), 16):
        x = features.read(rows[first : first + 16], choice).to(device).flatten(0, 2).float()
        total += torch.stack([x.sum(0), x.square().sum(0)]).double()
    mean, square = total / (len(rows) * features.grid[0] * features.grid[1])
    # The floor keeps a channel that never changes from being blown up.
    return mean.float(), (square - mean.square()).clamp(min=1e-12).sqrt().float()


class _LabelShares(Dataset):
    def __init__(self, images: SegmentationSet, rows: np.ndarray, grid: tuple[int, int]):
        self.images, self.rows, self.grid = images, rows, grid

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> Tensor | str:
        try:
            mask = self.images.read_matched_mask(int(self.rows[position]))
        except (ValueError, OSError) as error:
            return str(error)
        return torch.from_numpy(label_shares(mask, *self.grid, len(self.images.classes))).half()


def _all_label_shares(images: SegmentationSet, rows: np.ndarray, grid: tuple[int, int], workers: int) -> Tensor:
    """float16 [N, h, w, C]."""
    data = _LabelShares(images, rows, grid)
    shares = torch.empty(len(rows), *grid, len(images.classes), dtype=torch.float16)
    loader = DataLoader(
        data, batch_size=None, num_workers=workers, collate_fn=None, worker_init_fn=leave_signals_to_main
    )
    for position, found in enumerate(tqdm(loader, desc="labels of patches", unit="image", disable=rank() > 0)):
        if isinstance(found, str):
            raise ValueError(found)
        shares[position] = found
    return shares


def image_of_pair(images: SegmentationSet, index: int) -> np.ndarray:
    """uint8 [H, W, 3], after its mask was checked against it."""
    return images.read(index)[0]


def _image_of_row(images: SegmentationSet, rows: np.ndarray, position: int) -> np.ndarray:
    return image_of_pair(images, int(rows[position]))


def _spread(count: int, most: int) -> np.ndarray:
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)
