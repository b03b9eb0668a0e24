"""Cosine similarity of one patch to all others of its image, and the figure of it."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np


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
    picture: np.ndarray, points: Sequence[tuple[int, int]], features: dict[int, np.ndarray]
) -> plt.Figure:
    """The figure: a row for each point, a column for each block.

    Args:
        picture: uint8 [H, W, 3].
        points: (x, y) in its pixels.
        features: [h, w, D] of its patches, by the number of the block, from 0.
    """
    height, width = picture.shape[:2]
    figure, axes = plt.subplots(
        len(points), 1 + len(features),
        figsize=(2.2 * (1 + len(features)), (2.2 * height / width + 0.3) * len(points) + 0.2),
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for number, (row, (x, y)) in enumerate(zip(axes, points, strict=True)):
        row[0].imshow(picture)
        for axis, (block, grid) in zip(row[1:], features.items(), strict=True):
            h, w, _ = grid.shape
            similarity = patch_similarity(grid, y * h // height, x * w // width)
            axis.imshow(similarity, cmap="viridis", vmax=1, extent=(0, width, height, 0))
            axis.set_title("" if number else f"block {block + 1}", fontsize=8)
            axis.set_xlabel(f"{similarity.min():.2f} to 1", fontsize=7)
        for axis in row:
            axis.plot(x, y, "o", markersize=6, markerfacecolor="none", markeredgecolor="red", markeredgewidth=1.5)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    return figure
