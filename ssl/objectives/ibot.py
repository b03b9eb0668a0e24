"""iBOT (arXiv 2111.07832) as in DINOv2 (arXiv 2304.07193): the student says what the teacher sees in hidden patches."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from skipless.common.distributed import all_reduce_sum
from skipless.ssl.data.masks import draw_masks
from skipless.ssl.dino import CrossEntropy, sinkhorn_knopp

VALUES = 2**27  # largest number of float32 values that a part of the loss works on at a time


@dataclass
class IBOTSettings:
    """Masked patches, whose tokens are to be like the teacher's, which sees them. Off by default."""

    loss_weight: float = 0.0
    """Weight beside DINO's loss; 0 for none, 1 in DINOv2. Temperatures and balancing are those of `dino`."""
    out_dim: int | None = None
    """Outputs of a head of its own, as in DINOv2's large models; by default patches are read by DINO's head."""
    mask_sample_probability: float = 0.5
    """Share of the global crops that are masked."""
    mask_ratio_min_max: tuple[float, float] = (0.1, 0.5)
    """Range of the share of its patches that a masked crop loses, in blocks."""
    from_epoch: int = 0
    """Epoch, from 0 on, before which nothing is masked and the run is DINO's alone."""

    def __post_init__(self) -> None:
        for name, fits, rule in (
            ("loss_weight", self.loss_weight >= 0, "it must be 0 or more"),
            ("out_dim", self.out_dim is None or self.out_dim >= 1, "it must be at least 1"),
            ("mask_sample_probability", 0 < self.mask_sample_probability <= 1, "it must be in (0, 1]"),
            (
                "mask_ratio_min_max",
                0 < self.mask_ratio_min_max[0] <= self.mask_ratio_min_max[1] < 1,
                "it must be two rising shares in (0, 1)",
            ),
            ("from_epoch", self.from_epoch >= 0, "it must be 0 or more"),
        ):
            if not fits:
                raise ValueError(f"ibot.{name} is {getattr(self, name)}: {rule}")

    @property
    def on(self) -> bool:
        """Whether there is such a loss."""
        return self.loss_weight > 0

    def masks(self, side: int) -> Callable[[int, np.random.Generator], np.ndarray] | None:
        """What draws the masks, see `draw`, for grids of side * side patches; None where there is no such loss."""
        return partial(self.draw, side) if self.on else None

    def draw(self, side: int, epoch: int, rng: np.random.Generator) -> np.ndarray:
        """Masks of an image's global crops of side * side patches: bool [2, side * side]."""
        probability = self.mask_sample_probability if epoch >= self.from_epoch else 0.0
        return draw_masks(side, probability, self.mask_ratio_min_max, rng)


class IBOTLoss(nn.Module):
    """Cross-entropy between the teacher's and the student's distribution at every hidden patch (eq. 2 of iBOT).

    Averaged over the hidden patches of a crop and then over all global crops, those without a mask included, as DINOv2
    does: with half of the crops masked, it starts at half of ln K. The teacher's logits are centered, by their own mean
    over hidden patches, or balanced by Sinkhorn-Knopp over the hidden patches of a micro-batch on all processes.

    Args:
        prototypes: K; student_temperature, center_momentum, balancing: as in `DINOLoss`.
    """

    center: Tensor
    _sum: Tensor

    def __init__(
        self,
        prototypes: int,
        student_temperature: float = 0.1,
        center_momentum: float = 0.9,
        balancing: Literal["center", "sinkhorn"] = "center",
    ):
        super().__init__()
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.balancing = balancing
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("_sum", torch.zeros(prototypes + 1), persistent=False)  # of logits, and how many

    def forward(self, student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The loss of one micro-batch, and the part of it that the teacher's entropy is not (without gradient).

        Args:
            student, teacher: logits [M, K] of the hidden patches; there may be none.
            weights: float32 [M], see `Masks`; temperature: of the teacher's softmax.
        """
        logits, weights = teacher.detach().float(), weights[:, None]
        if self.balancing == "center":
            with torch.no_grad():
                self._sum[:-1] += logits.sum(0)
                self._sum[-1] += len(logits)
            p = ((logits - self.center) / temperature).softmax(dim=-1)
        else:
            p = sinkhorn_knopp(logits, temperature)
        with torch.no_grad():
            entropy = (torch.special.entr(p).sum(1, keepdim=True) * weights).sum()
        p *= weights
        rows = max(1, VALUES // p.shape[1])
        parts = zip(p.split(rows), weights.split(rows), strict=True)
        loss = CrossEntropy.apply(student, parts, rows, self.student_temperature, 1.0)
        return loss, loss.detach() - entropy

    @torch.no_grad()
    def update_center(self) -> None:
        """Move the center towards the mean teacher logit of all hidden patches since the last call, on all processes;
        where there were none, leave it."""
        if self.balancing != "center":
            return
        total = all_reduce_sum(self._sum)
        mean, any_hidden = total[:-1] / total[-1].clamp(min=1), total[-1].clamp(max=1)
        self.center.lerp_(mean, (1 - self.center_momentum) * any_hidden)
        self._sum.zero_()
