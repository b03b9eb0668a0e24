"""What CLS looks at: its attention over the image, head by head, in any block.

    python eval/attention_maps.py --ckpt runs/photos --images photos --out attention.png
    python eval/attention_maps.py --ckpt dino_vits16.pth --images photo.jpg --block 9 --size 480 --out heads.pdf

Rows are images, columns the heads of one block; each map is scaled to its own maximum. The title says how much of the
attention goes to CLS itself, on the mean over the images: in skipless models, whose attention begins close to the
identity, that may be nearly all of it, and what is left on the patches then means little.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.eval.backbones import Backbone, Weights, choose_block, load_backbone
from skipless.eval.figures.pictures import check_out, fit, pick_images, save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "skipless"


@dataclass
class Settings:
    """Attention of CLS."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    images: str
    """A folder or zip archive of images, or one image file."""
    out: str = "attention.png"
    """The figure: .png, .pdf or .svg."""
    block: str = "last"
    """Block whose attention is shown: last, or a number from 1."""
    count: int = 4
    """At most so many images, evenly spread over the folder."""
    size: int = 448
    """Short side in pixels that images are resized to; both sides are rounded to multiples of the patch."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1:
            raise ValueError("count and size must be 1 or more")


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
        images: normalised [B, 3, H, W], height and width multiples of the patch.
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


def draw_attention(settings: Settings) -> Path:
    """Draw the figure that `settings` ask for, and return its path.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, images or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out)
    backbone = load_backbone(settings.ckpt, settings.weights).to(device)
    (block,) = choose_block(settings.block, False, backbone)
    pictures = pick_images(settings.images, settings.count)
    maps = []
    for _, picture in tqdm(pictures, desc="attention", unit="image", disable=len(pictures) < 20):
        fed = backbone.normalize(fit(picture, settings.size, backbone.patch)[None])
        maps += cls_attention(backbone, fed, (block,))
    to_itself = torch.cat([m.cls for m in maps]).mean(0)
    heads = len(to_itself)
    heights = [picture.shape[0] / picture.shape[1] for _, picture in pictures]
    figure, axes = plt.subplots(
        len(pictures), 1 + heads,
        figsize=(1.8 * (1 + heads), 1.8 * sum(heights) + 0.5),
        squeeze=False, gridspec_kw={"height_ratios": heights}, layout="constrained",
    )  # fmt: skip
    for axis in axes.flat:
        axis.axis("off")
    axes[0, 0].set_title(f"block {block + 1}", fontsize=8)
    for head, share in enumerate(to_itself.tolist()):
        axes[0, 1 + head].set_title(f"head {head + 1}\n{100 * share:.0f} % to CLS", fontsize=8)
    for row, ((_, picture), of_image) in enumerate(zip(pictures, maps, strict=True)):
        axes[row, 0].imshow(picture)
        extent = (0, picture.shape[1], picture.shape[0], 0)
        for head in range(heads):
            shown = of_image.patches[0, head].cpu().numpy()
            axes[row, 1 + head].imshow(
                shown, cmap="inferno", vmin=0, vmax=max(float(np.max(shown)), 1e-12), extent=extent
            )
    save_figure(figure, out)
    plt.close(figure)
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""

    def draw(settings: Settings) -> None:
        print(f"written: {draw_attention(settings)}")

    cli.run(draw, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
