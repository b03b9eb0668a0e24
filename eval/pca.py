"""PCA pictures: the three main directions of patch features as red, green and blue.

The first thing to look at in a self-supervised model: with good features, objects come out in colors of their own.

    python eval/pca.py                                      # of what is there: "Without flags" in docs/evaluation.md
    python eval/pca.py --ckpt runs/photos --images photos --out pca.png              # 8 of the images, evenly spread
    python eval/pca.py --ckpt runs/photos --images photos --blocks 3,6,9,12 --out blocks.pdf
    python eval/pca.py --compare runs/residual runs/skipless --images photos --names Residual Skipless --out two.svg
    python eval/pca.py --ckpt runs/photos --images photos --foreground pca --style dinov3 --out objects.png
    python eval/pca.py --ckpt runs/photos --images photos --width 6.9 --out paper.pdf           # two columns of a paper

Rows are images; columns are blocks of the checkpoint, or checkpoints. Many images stand side by side instead, with
their colors below. One PCA serves all images of a block, so that a color means the same in all of them (--per-image
fits one to each). Blocks, and checkpoints, are rotated to each other, so that colors mean the same across them as far
as they can. The same features give the same colors on every run and machine, in whatever order the images come: each
component is turned so that it is skewed to the right.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from skipless.common import cli, distributed
from skipless.common.files import new_path
from skipless.common.progress import Progress
from skipless.datasets.labels.masks import read_values
from skipless.datasets.public.places import DATA, first_there, say, scenes_instead
from skipless.eval.backbones import Weights, choose_blocks, load_backbone
from skipless.eval.defaults import choose_ckpt, say_ckpt
from skipless.eval.figures.pca import (
    Column,
    Foreground,
    Style,
    draw_columns,
    fit_column,
    match_colors,
    position_share,
    without_position,
)
from skipless.eval.figures.pictures import check_out, patch_features, pick_images, save_figure
from skipless.ssl.run.folder import RUNS

PHOTOGRAPHS = ("VOCdevkit/VOC2012/JPEGImages", "VOCdevkit/VOC2007/JPEGImages", "coco/val2017", "coco/train2014")


@dataclass
class Settings:
    """PCA pictures."""

    ckpt: str | None = None
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME. By
    default the run in runs/ that was finished last, or else skipless:tiny."""
    images: str = ""
    """A folder or zip archive of images, or one image file; by default photographs of VOC or COCO in data/, or else
    synthetic scenes."""
    out: str | None = None
    """The figure: .png, .pdf or .svg; by default a new file, runs/pca-1.png and so on."""
    compare: tuple[str, ...] = ()
    """Two or more backbones in place of ckpt."""
    names: tuple[str, ...] = ()
    """Titles of the checkpoints or blocks; by default their file names and numbers."""
    blocks: str = "last"
    """Blocks to show: last, last4, or numbers from 1, as in 3,6,9,12."""
    count: int = 8
    """At most so many images, evenly spread over the folder."""
    size: int = 448
    """Short side in pixels that images are resized to; both sides are rounded to multiples of the patch."""
    foreground: Foreground = "none"
    """none colors all patches. pca splits them by the first component, at Otsu's threshold: the background is the side
    that holds more of the images' borders. mask takes it from `masks`. The foreground gets a PCA of its own, and the
    background is black."""
    masks: str | None = None
    """foreground mask: folder of masks NAME.png, 8-bit gray or palette, not 0 where the foreground is."""
    style: Style = "dinov2"
    """dinov2: each component scaled from its 1st to its 99th percentile. dinov3: whitened, sigmoid(2 x)."""
    per_image: bool = False
    """A PCA for each image; by default one for all, so that a color means the same in all of them."""
    smooth: float = 0.0
    """Standard deviation, in patches, of a Gaussian blur of the three components; 0 for none."""
    upsample: bool = True
    """Resize components to the image bicubically, for soft pictures. false shows patches as squares, as they are."""
    match_colors: bool = True
    """Rotate the components of all blocks to match those of the last one shown, and of all checkpoints to match those
    of the first. false leaves each its own."""
    remove_position: bool = False
    """Take out what row and column explain (linear regression): for models whose colors show little but a gradient from
    one side of the image to the other."""
    layout: Literal["auto", "rows", "columns"] = "auto"
    """Images as rows or as columns; auto makes the figure wide."""
    width: float | None = None
    """Width of the figure in inches, as it will be printed: letters keep their size. 3.3 is a column of most papers,
    6.9 both."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


def draw_pca(settings: Settings) -> None:
    """Write the figure that `settings` ask for.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, images or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out or str(new_path(RUNS / "pca", ".png")))
    check(settings)
    chosen = choose_ckpt() if not settings.ckpt and not settings.compare else ""
    settings = replace(settings, images=settings.images or choose_images(), ckpt=settings.ckpt or chosen)
    if chosen:
        say_ckpt(chosen)
    names, pictures = zip(*pick_images(settings.images, settings.count), strict=True)
    masks = None
    if settings.masks:
        masks = [read_values(Path(settings.masks, f"{Path(name).stem}.png")) for name in names]
    columns = make_columns(settings, list(pictures), masks, device)
    if settings.match_colors:
        match_colors(columns, columns[0] if settings.compare else columns[-1], settings.per_image)
    across = len(pictures) > 1 + len(columns) if settings.layout == "auto" else settings.layout == "columns"
    looks = (settings.style, settings.smooth, settings.upsample, settings.per_image, across, settings.width)
    save_figure(draw_columns(list(pictures), columns, *looks), out)


def check(settings: Settings) -> None:
    """Raises ValueError for settings that contradict each other."""
    if len(settings.compare) == 1:
        raise ValueError("compare needs two backbones or more: --compare A B")
    if settings.ckpt and settings.compare:
        raise ValueError("give either --ckpt CKPT or --compare A B")
    if settings.count < 1 or settings.size < 1 or not 0 <= settings.smooth <= 100:
        raise ValueError("count and size must be 1 or more, and smooth 0 to 100 patches")
    if (settings.foreground == "mask") != (settings.masks is not None):
        raise ValueError("foreground mask and masks FOLDER belong together: give both or neither")
    if settings.width is not None and settings.width <= 0:
        raise ValueError(f"width is {settings.width}; give inches, as in 6.9")


def choose_images() -> str:
    """Photographs in data/, else synthetic scenes; says which."""
    if there := first_there(PHOTOGRAPHS):
        say(f"images: {DATA / there}")
        return str(DATA / there)
    return str(scenes_instead("voc07") / "val")


def make_columns(
    settings: Settings, pictures: list[np.ndarray], masks: list[np.ndarray] | None, device: torch.device
) -> list[Column]:
    """Blocks of the one checkpoint, or one block of each."""
    columns: list[Column] = []
    for ckpt in settings.compare or (settings.ckpt or "",):
        backbone = load_backbone(ckpt, settings.weights).to(device)
        (blocks,) = choose_blocks(settings.blocks, False, backbone)
        if settings.compare and len(blocks) > 1:
            raise ValueError("compare shows one block of each; give one number to --blocks, or leave it out")
        count = len(settings.compare) or len(blocks)
        if settings.names and len(settings.names) != count:
            raise ValueError(f"names has {len(settings.names)} titles, and the figure shows {count}; give one for each")
        name = Path(ckpt).stem if settings.compare else "block"
        bar = Progress(pictures, desc=Path(ckpt).name, unit="image", active=len(pictures) * backbone.depth >= 50)
        features = [patch_features(backbone, picture, settings.size, blocks) for picture in bar]
        for block, block_features in zip(blocks, map(list, zip(*features, strict=True)), strict=True):
            title = name if settings.compare and settings.blocks == "last" else f"{name} {block + 1}"
            title = settings.names[len(columns)] if settings.names else title
            if settings.remove_position:
                block_features = without_position(block_features)
            column = fit_column(title, block_features, settings.foreground, masks, settings.per_image)
            share = position_share(column.components)
            if share > 0.5:
                print(
                    f"note: {100 * share:.0f} % of what the colors of {title} show is the place in the image; "
                    "--remove-position takes it out"
                )
            columns.append(column)
    return columns


main = partial(cli.run, draw_pca, Settings, __doc__)

if __name__ == "__main__":
    main()
