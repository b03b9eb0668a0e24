"""What changes over a run, as functions of the step: DINO's schedules."""

import math

from skipless.ssl.config import Settings


def cosine(step: int, total: int, start: float, end: float, warmup: int = 0) -> float:
    """DINO's schedule: linear from 0 to `start` over `warmup` steps, its end included, then half a cosine to `end`.

    Args:
        step: from 0 to total - 1.

    Example:
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


class Rates:
    """What changes over a run, as functions of the step (arXiv 2104.14294, section 3.2 and appendix)."""

    def __init__(self, settings: Settings, steps_per_epoch: int, total: int):
        self.optimizer, self.dino = settings.optimizer, settings.dino
        self.steps_per_epoch, self.total = steps_per_epoch, total
        self.peak = settings.optimizer.lr * settings.batch_size / 256
        self.warmup = round(settings.optimizer.warmup_epochs * steps_per_epoch)

    def lr(self, step: int) -> float:
        return cosine(step, self.total, self.peak, self.optimizer.min_lr, self.warmup)

    def weight_decay(self, step: int) -> float:
        return cosine(step, self.total, self.optimizer.weight_decay, self.optimizer.weight_decay_end)

    def momentum(self, step: int) -> float:
        return cosine(step, self.total, self.dino.momentum_teacher, 1.0)

    def teacher_temperature(self, step: int) -> float:
        epoch = step // self.steps_per_epoch
        warm, final = self.dino.warmup_teacher_temp, self.dino.teacher_temp
        return ramp(epoch, warm, final, self.dino.warmup_teacher_temp_epochs)

    def last_layer_frozen(self, step: int) -> bool:
        return step < self.dino.freeze_last_layer * self.steps_per_epoch
