"""What a run minimizes: DINO's loss, and beside it iBOT and KoLeo where they have a weight."""

import torch
from torch import Tensor, nn

from skipless.ssl.data.masks import Masks
from skipless.ssl.dino import DINOLoss, DINOOutput, DINOSettings, Outputs
from skipless.ssl.objectives.ibot import IBOTLoss, IBOTSettings
from skipless.ssl.objectives.koleo import koleo


class Objective:
    """The sum of the losses that have a weight. Without others it is DINO's, and costs what that costs.

    Args:
        views: global and local crops of an image.
    """

    def __init__(self, dino: DINOSettings, ibot: IBOTSettings, views: int, device: torch.device):
        self.views, self.koleo_weight, self.ibot_weight = views, dino.koleo_loss_weight, ibot.loss_weight
        how = (dino.student_temp, dino.center_momentum, dino.balancing)
        self.dino = DINOLoss(dino.out_dim, *how).to(device)
        self.ibot = IBOTLoss(ibot.out_dim or dino.out_dim, *how).to(device) if ibot.on else None

    @property
    def parts(self) -> dict[str, nn.Module]:
        """What has a state, by the names that checkpoints have for them."""
        return {"objective": self.dino} | ({"ibot": self.ibot} if self.ibot else {})

    @property
    def names(self) -> tuple[str, ...]:
        """Of the values of a micro-batch: those of `DINOOutput`, and of other losses without their weights."""
        return (
            *DINOOutput._fields, *(("ibot", "ibot_kl") if self.ibot else ()), *(("koleo",) if self.koleo_weight else ())
        )  # fmt: skip

    def __call__(self, student: Outputs, teacher: Outputs, masks: Masks, temperature: float) -> tuple[Tensor, ...]:
        """The sum of a micro-batch, with gradient, and its values, in the order of `names`.

        Args:
            student, teacher: what they say of all crops, and of the two global ones.
            temperature: of the teacher's softmax.
        """
        result = self.dino(student.logits, teacher.logits, self.views, temperature)
        total, values = result.loss, [*result]
        if self.ibot and masks.weights is not None:
            assert student.patch_logits is not None
            assert teacher.patch_logits is not None
            loss, kl = self.ibot(student.patch_logits, teacher.patch_logits, masks.weights, temperature)
            total, values = total + self.ibot_weight * loss, [*values, loss, kl]
        if self.koleo_weight:
            first, second = student.pooled[: len(teacher.logits)].chunk(2)
            loss = koleo(first) + koleo(second)
            total, values = total + self.koleo_weight * loss, [*values, loss]
        return total, *values

    def end_step(self) -> None:
        """Move the centers."""
        self.dino.update_center()
        if self.ibot:
            self.ibot.update_center()
