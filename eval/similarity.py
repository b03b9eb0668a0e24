"""Cosine similarity of one patch's features to those of all others, in any blocks.

    python eval/similarity.py --ckpt runs/photos --image photo.jpg --points 120,80 300,200 --out similarity.png
    python eval/similarity.py --ckpt runs/photos --image photo.jpg --points 120,80 --blocks 3,6,9,12 --out blocks.pdf

Points are x,y in pixels of the image, from its top left corner. Rows are points, columns blocks; all maps
share one scale of colors, which the bar beside them shows. On the page of eval/report.py you point at patches instead.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skipless.common import cli, distributed
from skipless.eval.backbones import Weights, choose_blocks, load_backbone
from skipless.eval.figures.pictures import check_out, parse_point, patch_features, pick_images, save_figure
from skipless.eval.figures.similarity import draw_similarity


@dataclass
class Settings:
    """Similarity of patches."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    image: str
    """An image file."""
    points: tuple[str, ...] = ()
    """Points x,y in pixels of the image, as in 120,80 300,200; by default its center."""
    out: str = "similarity.png"
    """The figure: .png, .pdf or .svg."""
    blocks: str = "last"
    """Blocks to show: last, last4, or numbers from 1, as in 3,6,9,12."""
    size: int = 448
    """Short side in pixels that the image is resized to; both sides are rounded to multiples of the patch."""
    width: float | None = None
    """Width of the figure in inches, as it will be printed; by default 2.2 for a column."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("size must be 1 or more")
        if self.width is not None and self.width <= 0:
            raise ValueError(f"width is {self.width}; give inches, as in 6.9")


def draw(settings: Settings) -> None:
    """Write the figure that `settings` ask for.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, an image or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out)
    if not Path(settings.image).is_file():
        raise FileNotFoundError(f"{settings.image}: no such image file")
    ((_, picture),) = pick_images(settings.image, 1)
    height, width = picture.shape[:2]
    points = [parse_point(word, height, width) for word in settings.points or (f"{width // 2},{height // 2}",)]
    backbone = load_backbone(settings.ckpt, settings.weights).to(device)
    (blocks,) = choose_blocks(settings.blocks, False, backbone)
    features = patch_features(backbone, picture, settings.size, blocks)
    maps = dict(zip(blocks, features, strict=True))
    save_figure(draw_similarity(picture, points, maps, settings.width), out)


main = partial(cli.run, draw, Settings, __doc__)

if __name__ == "__main__":
    main()
