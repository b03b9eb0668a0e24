"""Distillation of a frozen teacher's tokens: the student's heads, their targets, and the loss."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.ssl.dino import Pool
from skipless.ssl.model.vit import VisionTransformer


@dataclass
class DistillationSettings:
    """The loss on the teacher's tokens, each channel of them standardized over some hundred images."""

    loss: Literal["smooth-l1", "cosine"] = "smooth-l1"
    """smooth-l1 of every channel, or one minus the cosine similarity of the tokens."""
    cls_loss_weight: float = 0.0
    """Weight of the same loss on the teacher's class token, read from what `model.pool` makes of the student's tokens;
    0 for none. With teacher.cache it is the class token of the whole square, whatever the crop."""
    head_speed: float = 4.0
    """How many times faster than the backbone the heads learn. Skipless and residual students want them faster."""

    def __post_init__(self) -> None:
        if self.cls_loss_weight < 0:
            raise ValueError(f"distillation.cls_loss_weight is {self.cls_loss_weight:g}; it must be 0 or more")
        if self.head_speed <= 0:
            raise ValueError(f"distillation.head_speed is {self.head_speed:g}; it must be positive")


class Student(nn.Module):
    """A backbone and linear layers from its tokens to the teacher's.

    Optimizers whose steps do not depend on a gradient's scale (AdamW, SOAP, Muon) move a layer whose outputs are
    multiplied by s as if its learning rate were s times as large: that is how heads learn faster.

    Args:
        width: channels of the teacher.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: VisionTransformer, width: int, settings: DistillationSettings, pool: Pool):
        super().__init__()
        self.backbone, self.settings, self.pool = backbone, settings, pool
        self.head = nn.Linear(backbone.dim, width)
        self.cls_head = nn.Linear(backbone.dim, width) if settings.cls_loss_weight else None
        for head in (self.head, self.cls_head):
            if head is not None:
                nn.init.trunc_normal_(head.weight, std=0.02 / settings.head_speed)
                nn.init.zeros_(head.bias)
        # Of the teacher's class token and of its patches.
        self.register_buffer("mean", torch.zeros(2, width))
        self.register_buffer("std", torch.ones(2, width))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, 3, H, W] -> what it says of the teacher's patches [B, N, D], and of its class token [B, D]."""
        (tokens,) = self.backbone([images])
        patches = tokens[:, 1 + self.backbone.registers :]
        cls = None
        if self.cls_head is not None:
            cls = self.settings.head_speed * self.cls_head(tokens[:, 0] if self.pool == "cls" else patches.mean(1))
        return self.settings.head_speed * self.head(patches), cls

    @torch.no_grad()
    def standardize(self, tokens: Tensor) -> None:
        """Take mean and standard deviation of the teacher's channels from some of its tokens [B, 1 + N, D]."""
        tokens = tokens.float()
        for row, part in enumerate((tokens[:, 0], tokens[:, 1:].flatten(0, 1))):
            self.mean[row], self.std[row] = part.mean(0), part.std(0).clamp_min(1e-6)

    @torch.no_grad()
    def targets(self, tokens: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """The teacher's tokens [B, 1 + N, D] as `forward` should give them: standardized, patches on the student's grid
        of `side` * side; `boxes` as in `grid_in_boxes`."""
        standard = (tokens.float() - self.mean[1]) / self.std[1]
        cls = (tokens[:, 0].float() - self.mean[0]) / self.std[0]
        return grid_in_boxes(standard[:, 1:], boxes, side), cls

    def loss(self, said: tuple[Tensor, Tensor | None], targets: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss, and the mean cosine similarity between what is said of the patches and what they are."""
        similarity = F.cosine_similarity(said[0].float(), targets[0], dim=-1).mean()

        def one(ours: Tensor, theirs: Tensor) -> Tensor:
            if self.settings.loss == "cosine":
                return 1 - F.cosine_similarity(ours.float(), theirs, dim=-1).mean()
            return F.smooth_l1_loss(ours.float(), theirs)

        loss = one(said[0], targets[0])
        if said[1] is not None:
            loss = loss + self.settings.cls_loss_weight * one(said[1], targets[1])
        return loss, similarity.detach()


def grid_in_boxes(patches: Tensor, boxes: Tensor, side: int) -> Tensor:
    """A square grid of features, resampled in boxes: each cell of the new grid is the mean of bilinear samples, as many
    along a side as the whole grid has cells in one of the new cells.

    Args:
        patches: [B, g * g, D]; boxes: [B, 5], top, left, height and width in [0, 1] and 1 where the box is flipped;
            side: of the new grid.

    Returns:
        [B, side * side, D].
    """
    g = round(patches.shape[1] ** 0.5)
    samples = -(-g // side)
    steps = (torch.arange(side * samples, device=boxes.device, dtype=boxes.dtype) + 0.5) / (side * samples)
    top, left, height, width, flipped = boxes.unbind(1)
    across = torch.where(flipped[:, None] > 0, 1 - steps, steps)
    ys, xs = top[:, None] + height[:, None] * steps, left[:, None] + width[:, None] * across
    n = side * samples
    points = torch.stack([xs[:, None, :].expand(-1, n, -1), ys[:, :, None].expand(-1, -1, n)], dim=-1)
    grid = patches.unflatten(1, (g, g)).permute(0, 3, 1, 2)
    sampled = F.grid_sample(grid, 2 * points - 1, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, samples).flatten(2).transpose(1, 2)
