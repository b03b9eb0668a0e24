"""What an evaluation of segmentation finds: confusions of the classes, and some predictions to look at."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipless.common.distributed import all_reduce_sum, gather_objects
from skipless.eval.evaluation import Context
from skipless.eval.metrics import image_counts, known_pairs, miou_interval, pixel_pairs, segmentation_scores


@dataclass
class Outcome:
    """Of one or more heads, over a data set and all processes."""

    confusions: Tensor
    """int64 [heads, C, C]."""
    counts: Tensor
    """int64 [heads, N, 3, C], `image_counts` of every image."""
    predictions: dict[int, np.ndarray]
    """uint8 [H, W] of some images of the set, by the last of the heads."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else the result tells."""


class Tally:
    """Adds up what several heads predict, where they predict it: nothing waits for the device before the `outcome`.

    Args:
        heads, images, classes: how many there are.
        shown: images whose prediction is kept.
    """

    def __init__(self, heads: int, images: int, classes: int, device: torch.device, shown: Sequence[int] = ()):
        self.pairs = torch.zeros(heads, classes + 1, classes + 1, dtype=torch.int64, device=device)
        self.counts = torch.zeros(heads, images, 3, classes, dtype=torch.int64, device=device)
        self.predictions: dict[int, Tensor] = {}
        self.shown = shown

    def add(self, head: int, image: int, truth: Tensor, prediction: Tensor) -> None:
        """Compare integers [H, W] with each other; what is not in 0..C - 1 in the truth does not count."""
        pairs = pixel_pairs(truth, prediction, self.counts.shape[-1])
        self.pairs[head] += pairs
        self.counts[head, image] = image_counts(pairs[:-1, :-1])
        if image in self.shown and head == len(self.pairs) - 1:
            self.predictions[image] = prediction.to(torch.uint8)

    def outcome(self) -> Outcome:
        """The sum over all processes. Raises ValueError where a prediction was no class."""
        gathered = gather_objects({image: mask.cpu().numpy() for image, mask in self.predictions.items()})
        predictions = {image: prediction for part in gathered for image, prediction in part.items()}
        return Outcome(known_pairs(all_reduce_sum(self.pairs)), all_reduce_sum(self.counts), predictions)


class Figures(NamedTuple):
    """What an outcome comes to, for a result."""

    miou: float
    details: dict[str, Any]


def figures(context: Context, outcome: Outcome, classes: Sequence[str]) -> Figures:
    """mIoU of the last of the choices of blocks, and the details that all segmentation results have."""
    seed = context.recorded["seed"]
    scores = [segmentation_scores(confusion) for confusion in outcome.confusions]
    intervals = [miou_interval(counts.cpu().numpy(), seed) for counts in outcome.counts]
    details: dict[str, Any] = {
        "blocks": [block + 1 for block in context.choices[-1]],
        "interval_95": intervals[-1],
        "pixel_accuracy": scores[-1].pixel_accuracy,
        "iou": {name: None if math.isnan(x) else x for name, x in zip(classes, scores[-1].iou, strict=True)},
        **outcome.details,
    }
    if context.recorded["every_block"]:
        details["every_block"] = [
            {"block": choice[0] + 1, "miou": s.miou, "interval_95": interval, "pixel_accuracy": s.pixel_accuracy}
            for choice, s, interval in zip(context.choices, scores, intervals, strict=True)
        ]
    return Figures(scores[-1].miou, details)
