"""Similarity of patches against scikit-learn, and the sizes that images are resized to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

from skipless.eval.backbones import Backbone
from skipless.eval.figures.pictures import fit
from skipless.eval.figures.similarity import patch_similarity
from skipless.ssl.model.vit import VisionTransformer


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.data())
@settings(max_examples=40)
def test_similarity_is_scikit_learns(seed: int, h: int, w: int, dim: int, data: st.DataObject) -> None:
    """Whatever the lengths; some patches have none."""
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((h, w, dim)) * rng.choice([0, 1, 1e-3, 1e3], (h, w, 1))).astype(np.float32)
    row, column = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    similarity = patch_similarity(features, row, column)
    assert (similarity.shape, similarity.dtype) == ((h, w), np.float64)
    expected = cosine_similarity(features[row, column][None].astype(float), features.reshape(-1, dim).astype(float))
    np.testing.assert_allclose(similarity.ravel(), expected[0], atol=1e-9)
    assert similarity[row, column] == pytest.approx(float(features[row, column].any()))


@pytest.mark.parametrize(("row", "column"), [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_a_patch_outside_of_the_grid_is_an_error(row: int, column: int) -> None:
    with pytest.raises(IndexError, match=f"patch {row}, {column} lies outside of 2 x 3 patches"):
        patch_similarity(np.ones((2, 3, 4)), row, column)


@pytest.mark.parametrize(
    ("shape", "size", "patch", "expected"),
    [
        ((480, 640), 448, 14, (448, 602)),  # 597.3 is 42.7 patches
        ((640, 480), 448, 16, (592, 448)),  # 597.3 is 37.3 patches
        ((100, 100), 448, 16, (448, 448)),
        ((10, 1000), 4, 16, (16, 400)),  # a quarter of a patch becomes one
    ],
)
def test_sizes_are_rounded_to_patches(shape: tuple[int, int], size: int, patch: int, expected: tuple[int, int]) -> None:
    backbone = Backbone(VisionTransformer(24, 1, 2, patch=patch, image_size=patch), "x", "skipless", "0")
    assert fit(np.zeros((*shape, 3), np.uint8), size, backbone).shape == (*expected, 3)
    with pytest.raises(ValueError, match=r"6000 x 30 pixels, resized: .* patches; to compare each with each"):
        fit(np.zeros((30, 6000, 3), np.uint8), 100 * patch, backbone)
