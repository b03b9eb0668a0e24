"""What belongs together in two pictures: lines between patches that are each other's most similar.

    python eval/match.py cat.jpg dog.jpg --ckpt runs/photos --out match.png
    python eval/match.py cat.jpg dog.jpg --ckpt runs/photos --points 120,80 300,200 --out match.pdf

Points are x,y in pixels of the first picture, from its top left corner; each is found again in the second. Without
points, the best pairs are drawn that are each other's most similar, spread over the picture.
"""

import skipless.common.interruption  # noqa: F401

from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import ConnectionPatch

from skipless.common import cli, distributed
from skipless.eval.backbones import Weights, load_backbone
from skipless.eval.figures.pictures import check_out, parse_point, patch_features, pick_images, save_figure
from skipless.eval.matching import match_points, mutual_neighbors


@dataclass
class Settings:
    """Two pictures."""

    first: str
    """An image file."""
    second: str
    """Another one."""
    _: KW_ONLY
    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    points: tuple[str, ...] = ()
    """Points x,y in pixels of the first picture, as in 120,80 300,200; by default the best pairs of patches."""
    out: str = "match.png"
    """The figure: .png, .pdf or .svg."""
    count: int = 12
    """Without points: how many pairs are drawn, at most."""
    size: int = 448
    """Short side in pixels that both are resized to; sides are rounded to multiples of the patch."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if min(self.size, self.count) < 1:
            raise ValueError("size and count must be 1 or more")


def match(settings: Settings) -> None:
    """Write the figure that `settings` ask for.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, an image or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    out = check_out(settings.out)
    for path in (settings.first, settings.second):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such image file")
    (first,), (second,) = (pick_images(path, 1) for path in (settings.first, settings.second))
    pictures = [first[1], second[1]]
    sides = [(picture.shape[1], picture.shape[0]) for picture in pictures]  # width, height
    points = np.array([parse_point(word, *pictures[0].shape[:2]) for word in settings.points], float)
    backbone = load_backbone(settings.ckpt, settings.weights).to(device)
    last = [backbone.depth - 1]
    grids = [torch.from_numpy(patch_features(backbone, picture, settings.size, last)[0]) for picture in pictures]
    if len(points):
        shares = match_points(grids[0], grids[1], torch.from_numpy((points + 0.5) / sides[0])).numpy()
        ends = [points, shares * sides[1]]
    else:
        places = spread(*mutual_neighbors(grids[0], grids[1])[:2], settings.count)
        ends = [
            (place[:, ::-1] + 0.5) / (grid.shape[1], grid.shape[0]) * side
            for place, grid, side in zip(places, grids, sides, strict=True)
        ]
    save_figure(draw(pictures, ends), out)


def spread(first: np.ndarray, second: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The best pairs whose patches in the first picture are not neighbors of each other, as far as there are so many.

    Args:
        first, second: (row, column) of each pair, int [n, 2], the best first.
    """
    kept: list[int] = []
    for row in range(len(first)):
        if len(kept) < count and all(np.abs(first[row] - first[other]).max() > 1 for other in kept):
            kept.append(row)
    return first[kept], second[kept]


def draw(pictures: list[np.ndarray], ends: list[np.ndarray]) -> plt.Figure:
    """The two pictures beside each other with a line for every pair of points [n, 2], x and y in their pixels."""
    shapes = [picture.shape[1] / picture.shape[0] for picture in pictures]
    figure, axes = plt.subplots(
        1, 2, figsize=(3 * sum(shapes), 3), width_ratios=shapes, gridspec_kw={"wspace": 0.03}, layout="constrained"
    )
    for axis, picture in zip(axes, pictures, strict=True):
        axis.imshow(picture)
        axis.axis("off")
    colors = plt.get_cmap("turbo")(np.linspace(0.05, 0.95, max(len(ends[0]), 1)))
    for a, b, color in zip(*ends, colors, strict=False):
        line = ConnectionPatch(a, b, "data", "data", axesA=axes[0], axesB=axes[1], color=color, linewidth=1.3)
        figure.add_artist(line)
        for axis, (x, y) in zip(axes, (a, b), strict=True):
            axis.plot(x, y, "o", color=color, markersize=4, markeredgecolor="white", markeredgewidth=0.6)
    return figure


main = partial(cli.run, match, Settings, __doc__, positional=True)

if __name__ == "__main__":
    main()
