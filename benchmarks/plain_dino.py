"""DINO's training step written plainly, as facebookresearch/dino has it: what the library's step is measured against.

The same parameters and the same mathematics; what differs is how it is computed: a forward pass for each crop size,
attention as softmax(Q K^T) V with the map in memory, a loss for each pair of views, a norm, a clipping and a moving
average for each parameter on its own. Written from the published recipe (arXiv 2104.14294, algorithm 1 and appendix).
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipless.ssl.dino import DINOModel
from skipless.ssl.model.vit import Block, VisionTransformer


def plain_attention(block: Block, x: Tensor) -> Tensor:
    """Self-attention of [B, N, D] with its maps [B, heads, N, N] in memory."""
    heads = block.attn.num_heads
    q, k, v = block.attn.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return block.attn.proj((attention @ v).transpose(1, 2).flatten(2))


def plain_tokens(backbone: VisionTransformer, images: Tensor) -> Tensor:
    """Final-normed tokens [B, 1 + N, D] of images of one size."""
    x = backbone.embed(images)
    for block in backbone.blocks:
        assert isinstance(block, Block)
        branch = plain_attention(block, block.norm1(x))
        x = x + branch if block.residual else branch
        branch = block.mlp(block.norm2(x))
        x = x + branch if block.residual else branch
    return backbone.norm(x)


def plain_logits(model: DINOModel, crops: Sequence[Tensor]) -> Tensor:
    """Batches of crops, one for each size -> logits [sum N_i, K]: a pass for each size, then the head on all."""
    pooled = []
    for images in crops:
        tokens = plain_tokens(model.backbone, images)
        pooled.append(tokens[:, 0] if model.pool == "cls" else tokens[:, 1 + model.backbone.registers :].mean(dim=1))
    return model.head(torch.cat(pooled))


class PlainLoss(nn.Module):
    """Cross-entropy of each pair of views in turn, and the center."""

    center: Tensor

    def __init__(self, prototypes: int, student_temperature: float, center_momentum: float):
        super().__init__()
        self.student_temperature, self.center_momentum = student_temperature, center_momentum
        self.register_buffer("center", torch.zeros(prototypes))

    def forward(self, student: Tensor, teacher: Tensor, views: int, temperature: float) -> Tensor:
        """Student logits [views * B, K], teacher logits [2 * B, K], view by view. Moves the center."""
        of_students = (student.float() / self.student_temperature).chunk(views)
        of_teachers = ((teacher.float() - self.center) / temperature).softmax(dim=-1).detach().chunk(2)
        losses = []
        for i, p in enumerate(of_teachers):
            for j, z in enumerate(of_students):
                if i != j:
                    losses.append(torch.sum(-p * F.log_softmax(z, dim=-1), dim=-1).mean())
        with torch.no_grad():
            mean = teacher.float().mean(dim=0)
            self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
        return sum(losses, start=torch.zeros((), device=student.device)) / len(losses)


@torch.no_grad()
def plain_clip(model: nn.Module, limit: float, by: Literal["parameter", "model"]) -> None:
    """Clip the gradient of each parameter to a norm of its own, as DINO does, or all of them together."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if by == "model":
        nn.utils.clip_grad_norm_(parameters, limit, foreach=False)
        return
    for parameter in parameters:
        assert parameter.grad is not None
        coefficient = limit / (parameter.grad.norm(2) + 1e-6)
        if coefficient < 1:
            parameter.grad.mul_(coefficient)


@torch.no_grad()
def plain_update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Moving average, parameter by parameter."""
    for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        ours.mul_(momentum).add_((1 - momentum) * theirs.detach())
