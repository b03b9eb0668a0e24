"""Cosine similarity of one patch to all others of its image, and the figure of it."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from skipless.eval.figures.pictures import mark_point, picture_grid


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


def draw_similarity(
    picture: np.ndarray,
    points: Sequence[tuple[int, int]],
    features: dict[int, np.ndarray],
    width: float | None = None,
) -> plt.Figure:
    """The figure: a row for each point, a column for each block, one scale of colors for all.

    Args:
        picture: uint8 [H, W, 3].
        points: (x, y) in its pixels.
        features: [h, w, D] of its patches, by the number of the block, from 0.
        width: of the figure, in inches; by default 2.2 for a column.
    """
    high, wide = picture.shape[:2]
    maps = [
        [patch_similarity(grid, y * grid.shape[0] // high, x * grid.shape[1] // wide) for grid in features.values()]
        for x, y in points
    ]
    lowest = min(float(similarity.min()) for row in maps for similarity in row)
    width, bar_width = width or 2.2 * (1 + len(features)), 0.75
    figure, axes = picture_grid([picture] * len(points), len(features), 0, 0.3, width=max(width - bar_width, 1))
    figure.set_figwidth(width)
    for axis, block in zip(axes[0, 1:], features, strict=True):
        axis.set_title(f"block {block + 1}", fontsize=9)
    for row, similarities, point in zip(axes, maps, points, strict=True):
        for axis, similarity in zip(row[1:], similarities, strict=True):
            colors = axis.imshow(similarity, cmap="viridis", vmin=lowest, vmax=1, extent=(0, wide, high, 0))
        for axis in row:
            mark_point(axis, *point)
    bar = figure.colorbar(colors, ax=list(axes[:, -1]), shrink=0.9, pad=0.03)
    bar.set_label("cosine similarity", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    return figure
