"""Attention over an image, head by head, and the figure of it."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

from skipless.eval.backbones import Backbone
from skipless.eval.figures.pictures import mark_point, picture_grid
from skipless.ssl.model.vit import rotate

Query = Literal["cls", "mean"] | tuple[int, int]


class Attention(NamedTuple):
    """Attention of one query, or the mean over several, in one block. With what goes to registers, where there are any,
    all of it adds up to 1."""

    patches: Tensor
    """float32 [B, heads, h, w]"""
    cls: Tensor
    """float32 [B, heads], to CLS."""


@torch.no_grad()
def attention_maps(
    backbone: Backbone, images: Tensor, blocks: Sequence[int] = (-1,), query: Query = "cls"
) -> list[Attention]:
    """softmax(q k^T / sqrt(d_h)) for a query, in any blocks, in one pass.

    Args:
        images: normalized [B, 3, H, W], height and width multiples of the patch.
        blocks: which blocks, from 0; negative ones count from the end.
        query: CLS, the mean over the queries of all patches, or the patch in that row and column.

    Raises:
        IndexError: a block or a patch that is not there.
    """
    model = backbone.model
    numbers = [range(model.depth)[block] for block in blocks]
    b, grid = len(images), (images.shape[2] // model.patch, images.shape[3] // model.patch)
    rotation = model.rotation([(b, *grid)])
    attention = {}
    walk = zip(range(max(numbers) + 1), model.walk(model.embed(images), grid), strict=False)
    for number, (block, before, _) in walk:
        if number not in numbers:
            continue
        q, k, _ = block.attn.split(block.norm1(before).flatten(0, 1))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        q, k = (y.unflatten(0, (b, -1)).transpose(1, 2).float() for y in (q, k))  # [B, heads, tokens, d_h]
        asked = q[:, :, :1] if query == "cls" else q[:, :, model.prefix :]
        if isinstance(query, tuple):
            asked = asked.unflatten(2, grid)[:, :, query[0], query[1], None]
        weights = (asked @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(2)
        attention[number] = Attention(weights[..., model.prefix :].unflatten(-1, grid), weights[..., 0])
    return [attention[number] for number in numbers]


def draw_attention(
    pictures: list[np.ndarray],
    attention: list[Attention],
    title: str,
    point: tuple[int, int] | None = None,
    width: float | None = None,
) -> plt.Figure:
    """The figure: images in the first column, then a column for each head.

    Args:
        pictures: uint8 [H, W, 3] each.
        attention: for each picture, of one block.
        title: above the images.
        point: x and y of the query in pixels, marked in the images.
        width: of the figure, in inches; by default 1.8 for a column.
    """
    cls_shares = torch.cat([maps.cls for maps in attention]).mean(0)
    figure, axes = picture_grid(pictures, len(cls_shares), side=1.8, margin=0.5, width=width)
    axes[0, 0].set_title(title, fontsize=8)
    for head, share in enumerate(cls_shares.tolist(), 1):
        axes[0, head].set_title(f"head {head}\n{100 * share:.0f} % to CLS", fontsize=8)
    for row, picture, maps in zip(axes, pictures, attention, strict=True):
        extent = (0, picture.shape[1], picture.shape[0], 0)
        for axis, heat in zip(row[1:], maps.patches[0].cpu().numpy(), strict=True):
            axis.imshow(heat, cmap="inferno", vmin=0, vmax=max(float(heat.max()), 1e-12), extent=extent)
        if point:
            for axis in row:
                mark_point(axis, *point)
    return figure
