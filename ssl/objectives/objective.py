"""What a run minimizes: DINO's loss, and beside it iBOT, KoLeo and Gram where they have a weight."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipless.common.precision import autocast
from skipless.ssl.config import Settings
from skipless.ssl.data.masks import Masks
from skipless.ssl.dino import DINOLoss, DINOOutput, Outputs, cross_entropy
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.objectives.gram import Gram
from skipless.ssl.objectives.ibot import IBOTLoss
from skipless.ssl.objectives.koleo import koleo


class Objective:
    """The sum of the losses that have a weight. Without others it is DINO's, and costs what that costs.

    Args:
        cfg: resolved settings; backbone: the student's, before it is sharded.
    """

    def __init__(
        self,
        cfg: Settings,
        backbone: VisionTransformer,
        steps_per_epoch: int,
        device: torch.device,
        compile: Callable[[Any], Any] = lambda function: function,
    ):
        dino, ibot = cfg.dino, cfg.ibot
        how = (dino.student_temp, dino.center_momentum, dino.balancing)
        self.views = 2 + cfg.crops.local_crops_number
        self.weights = {"ibot": ibot.loss_weight, "koleo": dino.koleo_loss_weight, "gram": cfg.gram.loss_weight}
        self.dino = DINOLoss(dino.out_dim, *how).to(device)
        self.dino.cross_entropy = compile(cross_entropy)
        self.ibot = IBOTLoss(ibot.out_dim or dino.out_dim, *how).to(device) if ibot.on else None
        self.gram = None
        if cfg.gram.on:
            self.gram = Gram(backbone, cfg.gram, steps_per_epoch, autocast(device, cfg.precision == "bf16"))

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What has a state, by the names that checkpoints have for them."""
        parts = {"objective": self.dino, "ibot": self.ibot, "gram": self.gram}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values of a micro-batch: those of `DINOOutput`, and of other losses without their weights."""
        more = {"ibot": ("ibot", "ibot_kl"), "koleo": ("koleo",), "gram": ("gram",)}
        return (*DINOOutput._fields, *(name for loss, names in more.items() if self.weights[loss] for name in names))

    def start_step(self, step: int, teacher: Callable[[], VisionTransformer]) -> None:
        """What is due before a step; `teacher` gives the teacher's backbone, whole."""
        if self.gram:
            self.gram.start_step(step, teacher)

    def __call__(
        self, student: Outputs, teacher: Outputs, masks: Masks, larger: Tensor, temperature: float
    ) -> tuple[Tensor, ...]:
        """The sum of a micro-batch, with gradient, and its values, in the order of `names`.

        Args:
            student, teacher: what they say of all crops, and of the two global ones.
            larger: the global crops as Gram's teacher sees them; temperature: of the teacher's softmax.
        """
        result = self.dino(student.logits, teacher.logits, self.views, temperature)
        total, values = result.loss, [*result]
        if self.ibot:
            assert student.patch_logits is not None
            assert teacher.patch_logits is not None
            assert masks.weights is not None
            loss, kl = self.ibot(student.patch_logits, teacher.patch_logits, masks.weights, temperature)
            total, values = total + self.weights["ibot"] * loss, [*values, loss, kl]
        if self.weights["koleo"]:
            first, second = student.pooled[: len(teacher.logits)].chunk(2)
            loss = koleo(first) + koleo(second)
            total, values = total + self.weights["koleo"] * loss, [*values, loss]
        if self.gram:
            assert student.patches is not None
            loss = self.gram(student.patches, larger)
            total, values = total + self.weights["gram"] * loss, [*values, loss]
        return total, *values

    def end_step(self) -> None:
        """Move the centers."""
        self.dino.update_center()
        if self.ibot:
            self.ibot.update_center()
