"""Shared by the figures: which images, at which size the network sees them, their grid, and how the file is written."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from skipless.common.files import printable, write_atomically
from skipless.common.pixels import resample
from skipless.datasets.images import UnreadableImage, open_images, read_image
from skipless.eval.backbones import Backbone

matplotlib.use("Agg")
matplotlib.rcParams["text.parse_math"] = False  # $ in a name is a dollar
matplotlib.rcParams["svg.hashsalt"] = "skipless"  # the same names in the same figure
matplotlib.rcParams["pdf.fonttype"] = 42  # TrueType: IEEE and others refuse the Type 3 fonts that are the default

ENDINGS = (".png", ".pdf", ".svg")


def pick_images(path: str | Path, count: int) -> list[tuple[str, np.ndarray]]:
    """Names and pixels uint8 [H, W, 3] of at most `count` images, evenly spread over a folder or zip archive, or of one
    image file. Of a folder, those that cannot be read are left out, and named.

    Raises:
        ValueError, FileNotFoundError: no images there, or none that can be read.
    """
    path = Path(path).expanduser()
    if path.is_file() and path.suffix.lower() != ".zip":
        return [(printable(path.name), read_image(path))]
    source = open_images(path)
    rows = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    pictures = []
    for row in rows.tolist():
        try:
            pictures.append((printable(Path(source.names[row]).name), source.read(row)))
        except UnreadableImage as error:
            print(f"left out: {error}", file=sys.stderr)
    if not pictures:
        raise ValueError(f"none of {len(rows)} images of {path} can be read")
    return pictures


def fit(picture: np.ndarray, size: int, backbone: Backbone) -> np.ndarray:
    """A picture resized to a short side of about `size` pixels, its proportions kept up to the rounding of both sides
    to multiples of the patch: uint8 [h * patch, w * patch, 3]. Raises ValueError where that would be too large."""
    factor, patch = size / min(picture.shape[:2]), backbone.patch
    height, width = (max(1, round(side * factor / patch)) * patch for side in picture.shape[:2])
    backbone.require_room(f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels, resized", height, width)
    return resample(picture, height, width)


def patch_features(backbone: Backbone, picture: np.ndarray, size: int, blocks: Sequence[int]) -> list[np.ndarray]:
    """float32 [h, w, D] by each block, final norm applied, of a picture resized by `fit`.

    Raises:
        ValueError: features that are NaN or infinite.
    """
    fed = backbone.normalize(fit(picture, size, backbone)[None])
    features = [f.patches[0].float().cpu().numpy() for f in backbone.features(fed, blocks)]
    for block, grid in zip(blocks, features, strict=True):
        if not np.isfinite(grid).all():
            raise ValueError(f"features of block {block + 1} of {backbone.path} are NaN or infinite")
    return features


def check_out(out: str, setting: str = "out") -> Path:
    """The path of a figure. Raises ValueError for another ending than .png, .pdf and .svg."""
    if Path(out).suffix.lower() not in ENDINGS:
        raise ValueError(f"{setting} is {out}; it must end in {', '.join(ENDINGS)}")
    return Path(out)


def picture_grid(
    pictures: Sequence[np.ndarray],
    maps: int,
    side: float,
    margin: float,
    across: bool = False,
    width: float | None = None,
) -> tuple[plt.Figure, Any]:
    """A figure with the pictures [H, W, 3], each with `maps` empty axes: beside it, or with `across` below it.

    Args:
        side: width of a column in inches, or with `across` height of a row; the rest follows from the pictures.
        margin: height of the titles, in inches.
        width: of the whole figure in inches, in place of `side`.

    Returns:
        The figure and its axes [pictures, 1 + maps].
    """
    shapes = [picture.shape[0] / picture.shape[1] for picture in pictures]
    if across:
        ratios = [1 / shape for shape in shapes]
        side = width / sum(ratios) if width else side
        size = (side * sum(ratios), side * (1 + maps) + margin)
        grid: dict[str, Any] = {"nrows": 1 + maps, "ncols": len(pictures), "width_ratios": ratios}
    else:
        side = width / (1 + maps) if width else side
        size = (side * (1 + maps), side * sum(shapes) + margin)
        grid = {"nrows": len(pictures), "ncols": 1 + maps, "height_ratios": shapes}
    figure, axes = plt.subplots(figsize=size, squeeze=False, layout="constrained", **grid)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02)  # inches
    axes = axes.T if across else axes
    for axis in axes.flat:
        axis.axis("off")
    for row, picture in zip(axes, pictures, strict=True):
        row[0].imshow(picture)
    return figure, axes


def sheet(count: int, parts: int) -> tuple[plt.Figure, Any]:
    """A figure for `count` images, up to four side by side, each with `parts` empty axes below each other; the axes,
    [count, parts]."""
    columns = min(4, count)
    rows = -(-count // columns)
    size = (3 * columns, 2.4 * parts * rows)
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0, hspace=0)  # pads in inches
    figure, axes = plt.subplots(parts * rows, columns, figsize=size, squeeze=False, layout=layout)
    for axis in axes.flat:
        axis.axis("off")
    return figure, axes.reshape(rows, parts, columns).transpose(0, 2, 1).reshape(-1, parts)[:count]


def write_figure(figure: plt.Figure, out: Path) -> None:
    """Write a figure and close it; the same figure is the same file (no date in it, and fixed names in SVG)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(out.suffix.lower())
    ending = out.suffix[1:].lower()
    write_atomically(out, lambda beside: figure.savefig(beside, dpi=200, format=ending, metadata=metadata))
    plt.close(figure)


def save_figure(figure: plt.Figure, out: Path) -> None:
    """`write_figure`, and say so."""
    write_figure(figure, out)
    print(f"written: {out}")


def parse_point(word: str, height: int, width: int) -> tuple[int, int]:
    """x and y of a point "x,y" in an image of that size.

    Raises:
        ValueError: it is no point, or lies outside of the image.
    """
    try:
        x, y = (int(part) for part in word.split(","))
    except ValueError:
        raise ValueError(f"{word!r} is no point; give x,y in pixels, as in 120,80") from None
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"point {word} lies outside of the image, which has {width} x {height} pixels")
    return x, y


def mark_point(axis: Any, x: int, y: int) -> None:
    """A ring around a point of a picture, seen on any colors."""
    for color, thickness in (("white", 3.0), ("red", 1.5)):
        axis.plot(x, y, "o", markersize=6, markerfacecolor="none", markeredgecolor=color, markeredgewidth=thickness)


def label_row(axis: Any, text: str) -> None:
    """Write the name of a row of pictures up its left side."""
    axis.text(-0.03, 0.5, text, rotation=90, ha="right", va="center", fontsize=9, transform=axis.transAxes)
