"""PCA of patch features: components, alignment of two models, colors."""

from typing import Literal

import cv2
import numpy as np
from scipy.linalg import orthogonal_procrustes

Style = Literal["dinov2", "dinov3"]


def pca_components(features: list[np.ndarray], weights: list[np.ndarray] | None = None) -> list[np.ndarray]:
    """The three main components of patches by a PCA over all images together.

    The sign of a principal component is arbitrary, and colors would flip from run to run; here each component is
    turned so that its distribution is skewed to the right (as in CAPI, arXiv 2502.08769), or where it is symmetric, so
    that its largest loading is positive.

    Args:
        features: for each image [h, w, D], D >= 3; finite.
        weights: for each image bool [h, w]: patches that the PCA is fitted to; by default all.

    Returns:
        For each image float64 [h, w, 3]: scores, largest variance first.

    Raises:
        ValueError: features that are not finite, fewer than three channels, or fewer than three patches to fit to.
    """
    from sklearn.decomposition import PCA  # a second, which training need not spend at its start

    for f in features:
        if f.shape[-1] < 3 or not np.isfinite(f).all():
            raise ValueError(f"features of shape {f.shape} must be finite and [h, w, D] with D >= 3")
    flat = [f.reshape(-1, f.shape[-1]).astype(np.float64) for f in features]
    chosen = flat if weights is None else [x[w.ravel()] for x, w in zip(flat, weights, strict=True)]
    fitted = np.concatenate(chosen)
    if len(fitted) < 3:
        raise ValueError(f"a PCA of three components needs three patches or more, and there are {len(fitted)}")
    pca = PCA(3, svd_solver="covariance_eigh").fit(fitted)
    scores = pca.transform(fitted)
    skewness = (scores**3).mean(0) / np.maximum(scores.std(0), 1e-12) ** 3
    largest = pca.components_[np.arange(3), np.abs(pca.components_).argmax(1)]
    signs = np.where(np.where(np.abs(skewness) > 1e-6, skewness, largest) < 0, -1, 1)
    return [(pca.transform(x) * signs).reshape(*f.shape[:2], 3) for x, f in zip(flat, features, strict=True)]


def align(components: list[np.ndarray], reference: list[np.ndarray]) -> list[np.ndarray]:
    """Components rotated (and mirrored) to match those of another model on the same images: orthogonal Procrustes.

    Args:
        components, reference: for each image [h, w, 3]; grids may differ between the two.

    Returns:
        As `components`, scaled to the reference's size.
    """
    pairs = zip(components, reference, strict=True)
    resized = [cv2.resize(c, r.shape[1::-1], interpolation=cv2.INTER_AREA) for c, r in pairs]
    moved, fixed = (np.concatenate([x.reshape(-1, 3) for x in part]) for part in (resized, reference))
    moved, fixed = moved - moved.mean(0), fixed - fixed.mean(0)
    rotation, _ = orthogonal_procrustes(moved, fixed)
    scale = np.linalg.norm(fixed) / max(float(np.linalg.norm(moved)), 1e-12)
    return [scale * (c @ rotation) for c in components]


def component_colors(
    components: list[np.ndarray],
    style: Style = "dinov2",
    masks: list[np.ndarray] | None = None,
    percentile: float = 1.0,
) -> list[np.ndarray]:
    """Components as colors; black outside of the masks.

    Args:
        components: for each image [h, w, 3].
        style: "dinov2" scales each component from a percentile to its counterpart at the top, and clips; "dinov3"
            whitens and takes sigmoid(2 x).
        masks: for each image bool [h, w]; scaling looks at patches inside alone.

    Returns:
        For each image float64 [h, w, 3] in [0, 1].
    """
    masks = masks or [np.ones(c.shape[:2], bool) for c in components]
    inside = np.concatenate([c[m] for c, m in zip(components, masks, strict=True)])
    if style == "dinov2":
        low, high = np.percentile(inside, [percentile, 100 - percentile], axis=0)
        scaled = [((c - low) / np.maximum(high - low, 1e-12)).clip(0, 1) for c in components]
    else:
        mean, std = inside.mean(0), np.maximum(inside.std(0), 1e-12)
        scaled = [1 / (1 + np.exp(-2 * (c - mean) / std)) for c in components]
    return [s * m[..., None] for s, m in zip(scaled, masks, strict=True)]


def pca_colors(features: np.ndarray, percentile: float = 1.0) -> np.ndarray:
    """Colors of the patches of images of one size: `pca_components` and `component_colors` in one.

    Args:
        features: [B, h, w, D], at least 3 patches and D >= 3.

    Returns:
        float64 [B, h, w, 3] in [0, 1].

    Raises:
        ValueError: see `pca_components`.
    """
    return np.stack(component_colors(pca_components(list(features)), percentile=percentile))
