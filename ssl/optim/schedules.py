"""What changes over a run, as functions of the step: DINO's schedules."""

import math
from dataclasses import dataclass

from skipless.ssl.dino import DINOSettings
from skipless.ssl.optim.optimizers import OptimizerSettings


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0) -> float:
    """DINO's schedule: linear from 0 to `start` over `warmup` steps, its end included, then half a cosine to `end`.

    Args:
        step: from 0 to total - 1.

    Examples:
        >>> [round(cosine(s, 7, start=1.0, end=0.0, warmup=3), 3) for s in range(7)]
        [0.0, 0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return start * step / (warmup - 1) if warmup > 1 else 0.0
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def ramp(epoch: int, start: float, end: float, epochs: int) -> float:
    """Linear from `start` at epoch 0 to `end` at epoch `epochs - 1`, then constant: DINO's teacher temperature."""
    if epoch >= epochs:
        return end
    return start + (end - start) * epoch / max(1, epochs - 1)


@dataclass(frozen=True)
class Rates:
    """What holds for one step."""

    lr: float
    weight_decay: float

    def metrics(self) -> dict[str, float]:
        """The numbers, by name, for the log."""
        return {name: rate for name, rate in vars(self).items() if not isinstance(rate, bool)}


@dataclass(frozen=True)
class DINORates(Rates):
    """What holds for one step of DINO."""

    momentum: float
    teacher_temperature: float
    last_layer_frozen: bool


class Schedule:
    """Learning rate and weight decay of every step of a run.

    Args:
        images: how many there are; batch_size: how many a step takes of them. What is left of an epoch is dropped.
    """

    def __init__(self, optimizer: OptimizerSettings, epochs: int, batch_size: int, images: int):
        self.optimizer = optimizer
        self.steps_per_epoch = images // batch_size
        self.steps = epochs * self.steps_per_epoch
        self.peak = optimizer.lr * batch_size / 256
        self.warmup = round(optimizer.warmup_epochs * self.steps_per_epoch)

    def at(self, step: int) -> Rates:
        """The rates of a step, counted from 0."""
        return Rates(
            lr=cosine(step, self.steps, self.peak, self.optimizer.min_lr, self.warmup),
            weight_decay=cosine(step, self.steps, self.optimizer.weight_decay, self.optimizer.weight_decay_end),
        )


class DINOSchedule(Schedule):
    """What else changes over a run of DINO (arXiv 2104.14294, section 3.2 and appendix)."""

    def __init__(self, optimizer: OptimizerSettings, dino: DINOSettings, epochs: int, batch_size: int, images: int):
        super().__init__(optimizer, epochs, batch_size, images)
        self.dino = dino

    def at(self, step: int) -> DINORates:
        """The rates of a step, counted from 0."""
        dino, epoch = self.dino, step // self.steps_per_epoch
        return DINORates(
            **vars(super().at(step)),
            momentum=cosine(step, self.steps, dino.momentum_teacher, 1.0),
            teacher_temperature=ramp(
                epoch, dino.warmup_teacher_temp, dino.teacher_temp, dino.warmup_teacher_temp_epochs
            ),
            last_layer_frozen=step < dino.freeze_last_layer * self.steps_per_epoch,
        )
