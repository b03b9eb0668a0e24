"""Attention over an image, head by head, in any block: of CLS, of a patch, or of all patches on the mean.

    python eval/attention_maps.py --ckpt runs/photos --images photos --out attention.png
    python eval/attention_maps.py --ckpt dino_vits16.pth --images photo.jpg --block 9 --size 480 --out heads.pdf
    python eval/attention_maps.py --ckpt runs/photos --images photo.jpg --query 120,80 --out patch.png

Rows are images, columns the heads of one block; each map is scaled to its own maximum. The title says how much of the
attention goes to CLS, on the mean over the images. In skipless models, whose attention begins close to the identity,
CLS may look at hardly anything but itself, and what is left on the patches then means little. Where that is so, the
maps are the mean over the queries of all patches; the title and a line say it.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import dataclass
from functools import partial

import torch

from skipless.common import cli, distributed
from skipless.common.progress import Progress
from skipless.eval.backbones import Weights, choose_block, load_backbone
from skipless.eval.figures.attention_maps import Attention, Query, attention_maps, draw_attention
from skipless.eval.figures.pictures import check_out, fit, parse_point, pick_images, save_figure


@dataclass
class Settings:
    """Attention maps."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    images: str
    """A folder or zip archive of images, or one image file."""
    out: str = "attention.png"
    """The figure: .png, .pdf or .svg."""
    block: str = "last"
    """Block whose attention is shown: last, or a number from 1."""
    query: str = "auto"
    """Who looks: cls; mean, for the mean over all patches; or a point x,y in pixels of the image, as in 120,80. auto is
    cls, or mean where CLS looks at hardly anything but itself."""
    count: int = 4
    """At most so many images, evenly spread over the folder."""
    size: int = 448
    """Short side in pixels that images are resized to; both sides are rounded to multiples of the patch."""
    width: float | None = None
    """Width of the figure in inches, as it will be printed; by default 1.8 for a column."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1:
            raise ValueError("count and size must be 1 or more")
        if self.width is not None and self.width <= 0:
            raise ValueError(f"width is {self.width}; give inches, as in 6.9")


def draw(settings: Settings) -> None:
    """Write the figure that `settings` ask for.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, images or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out)
    pictures = [picture for _, picture in pick_images(settings.images, settings.count)]
    point = None
    if settings.query not in ("auto", "cls", "mean"):
        if len(pictures) > 1:
            raise ValueError(f"query {settings.query} is a point of one image, and there are {len(pictures)}")
        point = parse_point(settings.query, *pictures[0].shape[:2])
    backbone = load_backbone(settings.ckpt, settings.weights).to(device)
    (block,) = choose_block(settings.block, False, backbone)
    fed = [backbone.normalize(fit(picture, settings.size, backbone)[None]) for picture in pictures]
    query: Query = "mean" if settings.query == "mean" else "cls"
    if point is not None:
        (height, width), side = pictures[0].shape[:2], backbone.patch
        query = (point[1] * (fed[0].shape[2] // side) // height, point[0] * (fed[0].shape[3] // side) // width)

    def look(query: Query) -> list[Attention]:
        bar = Progress(fed, desc="attention", unit="image", active=len(fed) >= 20)
        return [attention_maps(backbone, image, (block,), query)[0] for image in bar]

    attention = look(query)
    to_itself = float(torch.cat([maps.cls for maps in attention]).mean())
    if settings.query == "auto" and to_itself > 0.9:
        print(
            f"note: {100 * to_itself:.0f} % of CLS's attention goes to itself; the maps are the mean over all patches"
        )
        query = "mean"
        attention = look(query)
    who = {"cls": "CLS", "mean": "mean of patches"}.get(str(query), "patch")
    part = ", the softmax of its shaped attention" if backbone.model.architecture.get("shaped") else ""
    title = f"block {block + 1}{part}\n{who}"
    save_figure(draw_attention(pictures, attention, title, point, settings.width), out)


main = partial(cli.run, draw, Settings, __doc__)

if __name__ == "__main__":
    main()
