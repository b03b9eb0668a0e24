"""Linear segmentation in minutes on a CPU: features of every image once, then many linear heads on them in one pass.

1. Images, resized to squares of a fixed size, go through the frozen backbone once; features are kept on disk.
2. For every choice of blocks and every learning rate a linear classifier of patches is trained, all in one pass over
   the features: standardized by their mean and standard deviation over the training set, AdamW, cosine schedule. The
   loss is the mean cross-entropy of all labeled pixels, a pixel having the logits of its patch: as these are equal
   within a patch, what the loss needs of the labels is the share of each class in it.
3. A tenth of the training images, evenly spread, is held out, and chooses the learning rate.
4. Logits are resized bilinearly to the original label, and every pixel counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from skipless.common.distributed import rank, world_size
from skipless.common.progress import Progress
from skipless.datasets.labels.masks import SegmentationSet
from skipless.eval.dense.data import square_features
from skipless.eval.dense.heads import Heads, fit, groups_by_rate, row_batches
from skipless.eval.dense.labels import predict, read_label_shares
from skipless.eval.dense.outcome import Outcome, Tally
from skipless.eval.evaluation import Context
from skipless.eval.features import Features
from skipless.eval.metrics import segmentation_scores


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
    context: Context,
    train: SegmentationSet,
    val: SegmentationSet,
    settings: QuickSettings,
    seed: int,
    shown: Sequence[int] = (),
) -> Outcome:
    """Run the protocol, with one set of heads for each of the context's choices of blocks.

    Args:
        shown: images of `val` whose prediction is wanted, by the last of the choices.

    Raises:
        ValueError: fewer than two training images, or unreadable or damaged ones.
    """
    choices = context.choices
    size = context.backbone.multiple_below(settings.size)
    train_rows = _spread(len(train), settings.max_images)
    if len(train_rows) < 2:
        raise ValueError(f"{train.name} {train.split} has one image; quick needs two or more, one of them held out")
    train_features = square_features(context, train, size, train_rows)
    val_features = square_features(context, val, size)
    held_out = np.arange(len(train_rows)) % 10 == 9 if len(train_rows) >= 10 else np.arange(len(train_rows)) == 0
    kept = np.flatnonzero(~held_out)

    shares = torch.empty(len(kept), *train_features.grid, len(train.classes), dtype=torch.float16)
    for position, share in enumerate(read_label_shares(train, train_rows[kept], train_features.grid, context.workers)):
        shares[position] = torch.from_numpy(share)
    heads = train_heads(train_features, kept, shares, choices, settings, seed, context.device)
    rows = np.flatnonzero(held_out)
    choosing = score_heads(heads, train_features, train, rows, train_rows, choices, "choosing")
    if not choosing.confusions.any():
        raise ValueError(
            f"{train.name} {train.split}: the {len(rows)} images that are held out to choose the learning rate have no "
            f"labeled pixel ({train.names[int(train_rows[rows[0]])]} is one of them); use other ones"
        )
    mious = np.array([segmentation_scores(c).miou for c in choosing.confusions]).reshape(len(choices), -1)
    best = np.nanargmax(mious, axis=1).tolist()
    chosen = [head.only(rate) for head, rate in zip(heads, best, strict=True)]
    rows = np.arange(len(val))
    outcome = score_heads(chosen, val_features, val, rows, rows, choices, f"{val.name} {val.split}", shown)
    outcome.details = {
        "image_size": size,
        "train_images": len(kept),
        "held_out_images": int(held_out.sum()),
        "learning_rates": [settings.learning_rates[rate] for rate in best],
        "held_out_miou": mious.tolist(),
    }
    return outcome


def train_heads(
    features: Features,
    rows: np.ndarray,
    shares: Tensor,
    choices: Sequence[tuple[int, ...]],
    settings: QuickSettings,
    seed: int,
    device: torch.device,
) -> list[Heads]:
    """Heads for every choice of blocks, trained together.

    Args:
        rows: of `features`, [N]; shares: of the classes in their patches, float16 [N, h, w, C].
    """
    rates = settings.learning_rates
    heads = [Heads(*_mean_and_std(features, rows, choice, device), len(rates), shares.shape[-1]) for choice in choices]
    optimizer = torch.optim.AdamW(groups_by_rate(heads, rates), weight_decay=settings.weight_decay)

    def losses(batch: np.ndarray) -> Iterator[Tensor]:
        target = shares[batch].to(device, non_blocking=True).flatten(0, 2).float()  # [P, C]
        for choice, head in zip(choices, heads, strict=True):
            x = features.read(rows[batch], choice).to(device, non_blocking=True).flatten(0, 2)
            log_p = head(x).log_softmax(-1)  # [P, heads, C]
            yield -(target * log_p.sum(1)).sum() / target.sum().clamp(min=1e-6)

    steps = settings.epochs * -(-len(rows) // settings.images_per_step)
    fit(heads, optimizer, row_batches(len(rows), settings.images_per_step, range(settings.epochs), seed), steps, losses)
    return heads


@torch.inference_mode()
def score_heads(
    heads: Sequence[Heads],
    features: Features,
    images: SegmentationSet,
    rows: np.ndarray,
    image_of_row: np.ndarray,
    choices: Sequence[tuple[int, ...]],
    title: str,
    shown: Sequence[int] = (),
) -> Outcome:
    """What all heads of all choices predict for some rows of `features`; positions in `rows` count as the images."""
    device = heads[0].mean.device
    tally = Tally(sum(len(head.weights) for head in heads), len(rows), len(images.classes), device, shown)
    mine = range(rank(), len(rows), world_size())
    for position in Progress(mine, desc=title, unit="image", active=rank() == 0):
        row = int(rows[position])
        mask = torch.from_numpy(images.read_matched_mask(int(image_of_row[row]))).to(device, non_blocking=True)
        logits: list[Tensor] = []  # [P, C] of each head
        for choice, head in zip(choices, heads, strict=True):
            x = features.read([row], choice).to(device, non_blocking=True)
            logits += head(x[0].flatten(0, 1)).unbind(1)
        for number, patches in enumerate(logits):
            tally.add(number, position, mask, predict(patches.T.unflatten(1, features.grid), mask.shape))
    return tally.outcome()


def _mean_and_std(
    features: Features, rows: np.ndarray, choice: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """float32 [D] each, over all patches of some rows."""
    total = torch.zeros(2, features.dim * len(choice), dtype=torch.float64, device=device)
    for first in range(0, len(rows), 16):
        x = features.read(rows[first : first + 16], choice).to(device, non_blocking=True).flatten(0, 2).float()
        total += torch.stack([x.sum(0), x.square().sum(0)]).double()
    mean, square = total / (len(rows) * features.grid[0] * features.grid[1])
    # The floor keeps a channel that never changes from being blown up.
    return mean.float(), (square - mean.square()).clamp(min=1e-12).sqrt().float()


def _spread(count: int, most: int) -> np.ndarray:
    return np.arange(count) if count <= most else np.linspace(0, count - 1, most).round().astype(int)
