"""Attention of CLS over an image, head by head, and the figure of it."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from skipless.eval.backbones import Backbone
from skipless.eval.figures.pictures import picture_grid


class ClsAttention(NamedTuple):
    """Attention of CLS in one block. With what goes to registers, where there are any, all of it adds up to 1."""

    patches: Tensor
    """float32 [B, heads, h, w]"""
    cls: Tensor
    """float32 [B, heads], to CLS itself."""


@torch.no_grad()
def cls_attention(backbone: Backbone, images: Tensor, blocks: Sequence[int] = (-1,)) -> list[ClsAttention]:
    """softmax(q k^T / sqrt(d_h)) for the query of CLS, in any blocks, in one pass.

    Args:
        images: normalized [B, 3, H, W], height and width multiples of the patch.
        blocks: which blocks, from 0; negative ones count from the end.

    Raises:
        IndexError: a block that the model does not have.
    """
    model = backbone.model
    numbers = [range(model.depth)[block] for block in blocks]
    b, grid = len(images), (images.shape[2] // model.patch, images.shape[3] // model.patch)
    attention = {}
    walk = zip(range(max(numbers) + 1), model.walk(model.embed(images)), strict=False)
    for number, (block, before, _) in walk:
        if number not in numbers:
            continue
        q, k, _ = block.attn.split(block.norm1(before).flatten(0, 1))
        q, k = (y.unflatten(0, (b, -1)).transpose(1, 2).float() for y in (q, k))  # [B, heads, tokens, d_h]
        weights = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0]
        attention[number] = ClsAttention(weights[..., 1 + model.registers :].unflatten(-1, grid), weights[..., 0])
    return [attention[number] for number in numbers]


def draw_attention(pictures: list[np.ndarray], attention: list[ClsAttention], block: int) -> plt.Figure:
    """The figure: images in the first column, then a column for each head.

    Args:
        pictures: uint8 [H, W, 3] each.
        attention: for each picture, of one block.
        block: its number, from 0, for the title.
    """
    cls_shares = torch.cat([maps.cls for maps in attention]).mean(0)
    figure, axes = picture_grid(pictures, len(cls_shares), side=1.8, margin=0.5)
    axes[0, 0].set_title(f"block {block + 1}", fontsize=8)
    for head, share in enumerate(cls_shares.tolist(), 1):
        axes[0, head].set_title(f"head {head}\n{100 * share:.0f} % to CLS", fontsize=8)
    for row, picture, maps in zip(axes, pictures, attention, strict=True):
        extent = (0, picture.shape[1], picture.shape[0], 0)
        for axis, heat in zip(row[1:], maps.patches[0].cpu().numpy(), strict=True):
            axis.imshow(heat, cmap="inferno", vmin=0, vmax=max(float(heat.max()), 1e-12), extent=extent)
    return figure
