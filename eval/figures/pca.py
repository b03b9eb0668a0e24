"""PCA of patch features as a figure: foreground, position, columns of images."""

from dataclasses import dataclass
from typing import Any, Literal

import cv2
import matplotlib.pyplot as plt
import numpy as np
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from skipless.common.files import printable
from skipless.common.pca import Style, align, component_colors, pca_components
from skipless.eval.figures.pictures import label_row, picture_grid

Foreground = Literal["none", "pca", "mask"]


def foreground_masks(features: list[np.ndarray]) -> list[np.ndarray]:
    """Foreground by the first component of a PCA over all images together (DINOv2, arXiv 2304.07193, section 7.5).

    The component is split at Otsu's threshold. The foreground is the side that holds the smaller share of the patches
    at the images' borders, so it does not depend on the component's sign.

    Returns:
        For each image bool [h, w].
    """
    first = [c[..., 0] for c in pca_components(features)]
    values = np.concatenate([c.ravel() for c in first])
    low, high = values.min(), values.max()
    levels = ((values - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    level, _ = cv2.threshold(levels[None], 0, 255, cv2.THRESH_OTSU)
    threshold = low + (level + 0.5) / 255 * (high - low)
    above = [c > threshold for c in first]
    border = np.concatenate([np.concatenate([m[0], m[-1], m[1:-1, 0], m[1:-1, -1]]) for m in above])
    return [~m for m in above] if border.mean() > np.mean(np.concatenate([m.ravel() for m in above])) else above


def position_share(components: list[np.ndarray]) -> float:
    """Share of the components' variance that row and column explain, in [0, 1]: R^2 of a linear regression.

    Args:
        components: for each image [h, w, 3].
    """
    places, scores = _places(components), np.concatenate([c.reshape(-1, c.shape[-1]) for c in components])
    predicted = LinearRegression().fit(places, scores).predict(places)
    return float(r2_score(scores, predicted, multioutput="variance_weighted"))


def without_position(features: list[np.ndarray]) -> list[np.ndarray]:
    """Features less what a linear regression on row and column, over all images together, says of them.

    Args:
        features: for each image [h, w, D].
    """
    places, flat = _places(features), np.concatenate([f.reshape(-1, f.shape[-1]) for f in features])
    rest = flat - places @ LinearRegression().fit(places, flat).coef_.T
    ends = np.cumsum([f.shape[0] * f.shape[1] for f in features])[:-1]
    return [part.reshape(f.shape) for part, f in zip(np.split(rest, ends), features, strict=True)]


def _places(grids: list[np.ndarray]) -> np.ndarray:
    """Row and column of all patches, each from -1 to 1 over its image: [patches, 2]."""
    places = []
    for grid in grids:
        rows, columns = (np.linspace(-1, 1, count) for count in grid.shape[:2])
        places.append(np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2))
    return np.concatenate(places)


@dataclass
class Column:
    """One column of the figure: all images, by one block of one backbone."""

    title: str
    components: list[np.ndarray]
    """For each image [h, w, 3]."""
    foreground: list[np.ndarray]
    """For each image bool [h, w]."""


def fit_column(
    title: str,
    features: list[np.ndarray],
    foreground: Foreground = "none",
    masks: list[np.ndarray] | None = None,
    per_image: bool = False,
) -> Column:
    """The components of a column, by one PCA over all images or one for each.

    Args:
        features: for each image [h, w, D].
        foreground: which patches it is fitted to: all; those of `foreground_masks`; those inside `masks`.
        masks: for "mask", for each image uint8 of any size, not 0 where the foreground is.

    Raises:
        ValueError: fewer than three patches are foreground.
    """
    column = Column(title, [], [])
    for group in image_groups(len(features), per_image):
        members = [features[i] for i in group]
        inside = [np.ones(f.shape[:2], bool) for f in members]
        if foreground == "pca":
            inside = foreground_masks(members)
        elif masks is not None:
            inside = [_mask_at(masks[i], f.shape[0], f.shape[1]) for i, f in zip(group, members, strict=True)]
        if sum(m.size for m in inside) < 3:
            count = sum(m.size for m in inside)
            raise ValueError(f"{title}: there are {count} patches, and three colors need three: give a larger --size")
        if sum(int(m.sum()) for m in inside) < 3:
            raise ValueError(f"{title}: fewer than three patches are foreground; use --foreground none")
        column.components += pca_components(members, inside)
        column.foreground += inside
    return column


def image_groups(count: int, per_image: bool) -> list[list[int]]:
    """Images that share a PCA and its colors."""
    return [[i] for i in range(count)] if per_image else [list(range(count))]


def _mask_at(mask: np.ndarray, h: int, w: int) -> np.ndarray:
    """A mask on a grid of patches: bool [h, w]."""
    return cv2.resize((mask > 0).astype(np.float32), (w, h), interpolation=cv2.INTER_AREA) > 0.5


def match_colors(columns: list[Column], reference: Column, per_image: bool = False) -> None:
    """Rotate the components of all columns to match those of one of them (`align`), in place."""
    for column in columns:
        if column is not reference:
            for group in image_groups(len(column.components), per_image):
                fixed = [reference.components[i] for i in group]
                for i, moved in zip(group, align([column.components[i] for i in group], fixed), strict=True):
                    column.components[i] = moved


def draw_columns(
    pictures: list[np.ndarray],
    columns: list[Column],
    style: Style = "dinov2",
    smooth: float = 0.0,
    upsample: bool = False,
    per_image: bool = False,
    across: bool = False,
    width: float | None = None,
) -> plt.Figure:
    """The figure: images in the first column, then the colors of each of `columns`; with `across` images in the first
    row, and colors below.

    Args:
        pictures: uint8 [H, W, 3] each.
        smooth: standard deviation, in patches, of a blur of the components; 0 for none.
        upsample: resize components to the images, bicubically.
        per_image: scale colors image by image.
        width: of the figure, in inches; by default 2 for a column, or with `across` 1.5 for the height of a row.
    """
    sizes = [picture.shape[1::-1] for picture in pictures]
    cubic: dict[str, Any] = {"interpolation": cv2.INTER_CUBIC}
    side, margin = (1.5, 0.0) if across else (2.0, 0.3)
    figure, axes = picture_grid(pictures, len(columns), side, margin, across, width)
    for number, column in enumerate(columns, 1):
        if across:
            label_row(axes[0, number], column.title)
        else:
            axes[0, number].set_title(printable(column.title), fontsize=9)
        components, masks = column.components, column.foreground
        if smooth:
            components = [cv2.GaussianBlur(c, (0, 0), smooth) for c in components]
        if upsample:
            components = [cv2.resize(c, size, **cubic) for c, size in zip(components, sizes, strict=True)]
            masks = [cv2.resize(m.astype(np.float32), s, **cubic) > 0.5 for m, s in zip(masks, sizes, strict=True)]
        for group in image_groups(len(pictures), per_image):
            drawn = component_colors([components[i] for i in group], style, [masks[i] for i in group])
            for i, colors in zip(group, drawn, strict=True):
                axes[i, number].imshow(colors, interpolation="nearest", extent=(0, sizes[i][0], sizes[i][1], 0))
    return figure
