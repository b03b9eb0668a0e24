"""What resembles a patch: the cosine similarity of one patch's features to all others, in any blocks.

    python eval/similarity.py --ckpt runs/photos --image photo.jpg --points 120,80 300,200 --out similarity.png
    python eval/similarity.py --ckpt runs/photos --image photo.jpg --points 120,80 --blocks 3,6,9,12 --out blocks.pdf

Points are x,y in pixels of the image, from its top left corner. Rows are points, columns blocks; colours run from the
smallest similarity in a map to 1, both written below it. The report page (eval/report.py) has the same for pointing at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from skipless.common import cli, distributed
from skipless.eval.backbones import Weights, choose_blocks, load_backbone
from skipless.eval.figures.pictures import check_out, patch_features, pick_images, save_figure

matplotlib.use("Agg")
import matplotlib.pyplot as plt

matplotlib.rcParams["svg.hashsalt"] = "skipless"


@dataclass
class Settings:
    """Similarity of patches."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    image: str
    """An image file."""
    points: tuple[str, ...] = ()
    """Points x,y in pixels of the image, as in 120,80 300,200; by default its centre."""
    out: str = "similarity.png"
    """The figure: .png, .pdf or .svg."""
    blocks: str = "last"
    """Blocks to show: last, last4, or numbers from 1, as in 3,6,9,12."""
    size: int = 448
    """Short side in pixels that the image is resized to; both sides are rounded to multiples of the patch."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("size must be 1 or more")


def patch_similarity(features: np.ndarray, row: int, column: int) -> np.ndarray:
    """Cosine similarity of one patch to all patches of its image.

    Args:
        features: [h, w, D].
        row, column: of the patch, from 0.

    Returns:
        float64 [h, w] in [-1, 1], 1 at the patch itself; 0 where either has no features.

    Raises:
        IndexError: a patch outside of the grid.
    """
    if not (0 <= row < features.shape[0] and 0 <= column < features.shape[1]):
        raise IndexError(f"patch {row}, {column} lies outside of {features.shape[0]} x {features.shape[1]} patches")
    lengths = np.linalg.norm(features.astype(np.float64), axis=-1, keepdims=True)
    directions = features / np.maximum(lengths, 1e-12)
    return directions @ directions[row, column]


def draw_similarity(settings: Settings) -> Path:
    """Draw the figure that `settings` ask for, and return its path.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, an image or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out)
    if not Path(settings.image).expanduser().is_file():
        raise FileNotFoundError(f"{settings.image}: no such image file")
    ((_, picture),) = pick_images(settings.image, 1)
    height, width = picture.shape[:2]
    points = [_point(word, height, width) for word in settings.points or (f"{width // 2},{height // 2}",)]
    backbone = load_backbone(settings.ckpt, settings.weights).to(device)
    (blocks,) = choose_blocks(settings.blocks, False, backbone)
    features = patch_features(backbone, picture, settings.size, blocks)
    h, w, _ = features[0].shape
    figure, axes = plt.subplots(
        len(points), 1 + len(blocks),
        figsize=(2.2 * (1 + len(blocks)), (2.2 * height / width + 0.3) * len(points) + 0.2),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for number, (line, (x, y)) in enumerate(zip(axes, points, strict=True)):
        line[0].imshow(picture)
        for axis, block, of_block in zip(line[1:], blocks, features, strict=True):
            similar = patch_similarity(of_block, y * h // height, x * w // width)
            axis.imshow(similar, cmap="viridis", vmax=1, extent=(0, width, height, 0))
            axis.set_title("" if number else f"block {block + 1}", fontsize=8)
            axis.set_xlabel(f"{similar.min():.2f} to 1", fontsize=7)
        for axis in line:
            axis.plot(x, y, "o", markersize=6, markerfacecolor="none", markeredgecolor="red", markeredgewidth=1.5)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    save_figure(figure, out)
    plt.close(figure)
    return out


def _point(word: str, height: int, width: int) -> tuple[int, int]:
    try:
        x, y = (int(part) for part in word.split(","))
    except ValueError:
        raise ValueError(f"points: {word!r} is no point; give x,y in pixels, as in 120,80") from None
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"points: {word} lies outside of the image, which has {width} x {height} pixels")
    return x, y


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""

    def draw(settings: Settings) -> None:
        print(f"written: {draw_similarity(settings)}")

    cli.run(draw, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
