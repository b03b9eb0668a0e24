"""Attention of CLS over an image, head by head, in any block.

    python eval/attention_maps.py --ckpt runs/photos --images photos --out attention.png
    python eval/attention_maps.py --ckpt dino_vits16.pth --images photo.jpg --block 9 --size 480 --out heads.pdf

Rows are images, columns the heads of one block; each map is scaled to its own maximum. The title says how much of the
attention goes to CLS itself, on the mean over the images: in skipless models, whose attention begins close to the
identity, that may be nearly all of it, and what is left on the patches then means little.
"""

from dataclasses import dataclass
from functools import partial

from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.eval.backbones import Weights, choose_block, load_backbone
from skipless.eval.figures.attention_maps import cls_attention, draw_attention
from skipless.eval.figures.pictures import check_out, fit, pick_images, save_figure


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


def draw(settings: Settings) -> None:
    """Write the figure that `settings` ask for.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, images or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out)
    backbone = load_backbone(settings.ckpt, settings.weights).to(device)
    (block,) = choose_block(settings.block, False, backbone)
    pictures = [picture for _, picture in pick_images(settings.images, settings.count)]
    attention = []
    for picture in tqdm(pictures, desc="attention", unit="image", disable=len(pictures) < 20):
        image = backbone.normalize(fit(picture, settings.size, backbone.patch)[None])
        attention += cls_attention(backbone, image, (block,))
    save_figure(draw_attention(pictures, attention, block), out)


main = partial(cli.run, draw, Settings, __doc__)

if __name__ == "__main__":
    main()
