"""Gram anchoring (DINOv3, arXiv 2508.10104, section 4): patches stay as alike as an earlier teacher has them."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.ssl.model.vit import VisionTransformer


@dataclass
class GramSettings:
    """Patches whose similarities are to stay those of an earlier teacher, for long runs. Off by default."""

    loss_weight: float = 0.0
    """Weight beside DINO's loss; 0 for none, 2 in DINOv3."""
    from_epoch: int = 0
    """Epoch, from 0 on, whose first teacher is held on to; before it there is no such loss. In an extension 0 is the
    teacher of the run that is extended."""
    every_epochs: int = 0
    """Epochs after which the teacher of then takes its place; 0 for never."""

    @property
    def on(self) -> bool:
        """Whether there is such a loss."""
        return self.loss_weight > 0

    def __post_init__(self) -> None:
        for name in ("loss_weight", "from_epoch", "every_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"gram.{name} is {getattr(self, name)}: it must be 0 or more")


def gram_loss(student: Tensor, anchor: Tensor) -> Tensor:
    """Mean squared difference of the cosine similarities between all pairs of an image's patches (equation 2, divided
    by the number of pairs, as in DINOv3's code).

    Args:
        student, anchor: patch tokens [N, n, D] of any float dtype.

    Returns:
        float32 [], with a gradient for `student`.
    """
    x, y = (F.normalize(tokens.float(), dim=-1) for tokens in (student, anchor))
    return (x @ x.mT - y @ y.mT).square().mean()


class Gram(nn.Module):
    """The loss, with its teacher: a backbone, whole on every process.

    Args:
        backbone: its architecture; steps_per_epoch: of the run; autocast: what its forward passes run in.
    """

    def __init__(
        self,
        backbone: VisionTransformer,
        settings: GramSettings,
        steps_per_epoch: int,
        autocast: AbstractContextManager[Any],
    ):
        super().__init__()
        self.teacher = copy.deepcopy(backbone).requires_grad_(False).eval()
        self.autocast = autocast
        self.first, self.every = (steps_per_epoch * n for n in (settings.from_epoch, settings.every_epochs))
        self.on = False

    def start_step(self, step: int, teacher: Callable[[], VisionTransformer]) -> None:
        """Take the teacher of now where that is due. Depends on the step alone: a resumed run does the same."""
        self.on = step >= self.first
        if step == self.first or (self.on and self.every and (step - self.first) % self.every == 0):
            self.teacher.load_state_dict(teacher().state_dict())

    def forward(self, patches: Tensor, crops: Tensor) -> Tensor:
        """The loss of the student's patch tokens [N, n, D], n = h * h; 0 before it begins.

        Args:
            crops: [N, 3, S, S], what this teacher sees of the same crops: the same pixels, or more of them. Its grid of
                tokens is brought to h x h (bicubic, not antialiased, as in DINOv3).
        """
        if not self.on:
            return patches.new_zeros((), dtype=torch.float32)
        with torch.no_grad(), self.autocast:
            anchor = self.teacher([crops])[0][:, 1 + self.teacher.registers :]
        if anchor.shape[1] != patches.shape[1]:
            large, small = (round(tokens.shape[1] ** 0.5) for tokens in (anchor, patches))
            grid = anchor.float().mT.unflatten(2, (large, large))
            anchor = F.interpolate(grid, size=(small, small), mode="bicubic").flatten(2).mT
        return gram_loss(patches, anchor)
