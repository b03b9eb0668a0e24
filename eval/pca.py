"""PCA pictures: the three main directions of patch features as red, green and blue.

The first thing to look at in a self-supervised model: with good features, objects come out in colours of their own.
"""

import numpy as np
from sklearn.decomposition import PCA


def pca_colours(features: np.ndarray, percentile: float = 1.0) -> np.ndarray:
    """Colours of patches by a PCA over all images together, so that the same colour means the same feature everywhere.

    The sign of a principal component is arbitrary, and colours would flip from run to run; here each component is
    turned so that its distribution is skewed to the right (as in CAPI, arXiv 2502.08769).

    Args:
        features: [B, h, w, D], at least 3 patches and D >= 3.
        percentile: each channel is scaled from this percentile to its counterpart at the top, and clipped.

    Returns:
        float64 [B, h, w, 3] in [0, 1].

    Raises:
        ValueError: features that are not finite, or of another shape.
    """
    if features.ndim != 4 or features.shape[-1] < 3 or not np.isfinite(features).all():
        raise ValueError(f"features of shape {features.shape} must be finite and [B, h, w, D] with D >= 3")
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    components = PCA(3, svd_solver="full").fit_transform(flat)
    components *= np.where((components**3).mean(axis=0) < 0, -1, 1)
    low, high = np.percentile(components, [percentile, 100 - percentile], axis=0)
    colours = (components - low) / np.maximum(high - low, 1e-12)
    return colours.clip(0, 1).reshape(*features.shape[:-1], 3)
