"""PCA of features: the same colors for the same features, foreground, alignment."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from skipless.common.pca import align, component_colors, pca_components
from skipless.eval.figures.pca import foreground_masks, position_share, without_position


def skewed(seed: int, shapes: list[tuple[int, int]], dim: int = 12) -> list[np.ndarray]:
    """Features of images with three clear, skewed directions."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:3] * np.array([[9.0], [5.0], [3.0]])
    return [rng.exponential(size=(*s, 3)) @ basis + 0.1 * rng.standard_normal((*s, dim)) for s in shapes]


def test_components_are_scikit_learns_and_skewed_to_the_right() -> None:
    features = skewed(0, [(6, 5), (4, 7)])
    components = np.concatenate([c.reshape(-1, 3) for c in pca_components(features)])
    expected = PCA(3).fit_transform(np.concatenate([f.reshape(-1, 12) for f in features]))
    np.testing.assert_allclose(np.abs(components), np.abs(expected), atol=1e-8)
    assert ((components**3).mean(0) > 0).all()


def test_colors_depend_neither_on_order_nor_on_the_basis_nor_on_the_sign_of_features() -> None:
    features = skewed(1, [(5, 5), (6, 4), (3, 8)])
    expected = pca_components(features)
    shuffled = pca_components([features[i] for i in (2, 0, 1)])
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((12, 12)))[0]
    turned = pca_components([f @ turn + 3.0 for f in features])
    negated = pca_components([-f for f in features])
    for i, place in enumerate((1, 2, 0)):
        np.testing.assert_allclose(shuffled[place], expected[i], atol=1e-8)
        np.testing.assert_allclose(turned[i], expected[i], atol=1e-8)
        np.testing.assert_allclose(negated[i], expected[i], atol=1e-8)


def test_only_chosen_patches_are_fitted_to() -> None:
    features = skewed(3, [(6, 6)])
    inside = np.zeros((6, 6), bool)
    inside[1:5, 2:5] = True
    wild = features[0].copy()
    wild[~inside] *= 100
    components = pca_components([wild], [inside])[0][inside]
    np.testing.assert_allclose(components, pca_components([features[0][1:5, 2:5]])[0].reshape(-1, 3), atol=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
def test_foreground_is_the_side_that_shuns_the_border(sign: int) -> None:
    rng = np.random.default_rng(4)
    truth = [np.zeros((8, 10), bool), np.zeros((9, 7), bool)]
    truth[0][2:6, 3:8] = True
    truth[1][3:9, 1:6] = True  # touches the border below
    direction = rng.standard_normal(6)
    features = [sign * t[..., None] * 5 * direction + 0.1 * rng.standard_normal((*t.shape, 6)) for t in truth]
    for mask, expected in zip(foreground_masks(features), truth, strict=True):
        np.testing.assert_array_equal(mask, expected)


def test_alignment_undoes_a_rotation_a_mirror_and_a_scale() -> None:
    rng = np.random.default_rng(5)
    reference = [rng.standard_normal((4, 5, 3)), rng.standard_normal((6, 3, 3))]
    mean = np.concatenate([r.reshape(-1, 3) for r in reference]).mean(0)
    reference = [r - mean for r in reference]
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0] * np.array([1, -1, 1])
    for aligned, expected in zip(align([0.3 * r @ turn for r in reference], reference), reference, strict=True):
        np.testing.assert_allclose(aligned, expected, atol=1e-10)


def test_position_is_what_rows_and_columns_explain() -> None:
    """Whatever the sizes of the images: features that are linear in the place are nothing but it, and what is
    orthogonal to it stays."""
    slopes = np.array([[3.0, 0, 1], [0, 2, 1]])
    checks = np.array([[1.0, -1], [-1, 1]])  # has no slope
    places = [np.stack(np.meshgrid([-1.0, 1], [-1.0, 1], indexing="ij"), -1)] * 2
    pure = [place @ slopes for place in places]
    mixed = [p + c * checks[..., None] * np.array([1.0, 1, 0]) for p, c in zip(pure, (1, 2), strict=True)]
    assert position_share(pure) == pytest.approx(1)
    assert position_share([c * checks[..., None] * np.ones(3) for c in (1, 2)]) == pytest.approx(0)
    # variances: 9 + 4 + 2 by the slopes; (1 + 4) / 2 by the checks in each of two channels
    assert position_share(mixed) == pytest.approx(15 / 20)
    for left, c in zip(without_position(mixed), (1, 2), strict=True):
        np.testing.assert_allclose(left, c * checks[..., None] * np.array([1.0, 1, 0]), atol=1e-12)


def test_styles_by_hand() -> None:
    components = [np.array([[[0.0, 0, 0], [1, 10, -1]], [[2, 20, -2], [99, 99, 99]]])]
    inside = [np.array([[True, True], [True, False]])]
    (scaled,) = component_colors(components, "dinov2", inside, percentile=0)
    np.testing.assert_allclose(scaled, [[[0, 0, 1], [0.5, 0.5, 0.5]], [[1, 1, 0], [0, 0, 0]]])
    (soft,) = component_colors(components, "dinov3", inside)
    high = 1 / (1 + np.exp(-2 * 1 / np.sqrt(2 / 3)))  # 0, 1 and 2 have a standard deviation of sqrt(2 / 3)
    np.testing.assert_allclose(
        soft, [[[1 - high, 1 - high, high], [0.5, 0.5, 0.5]], [[high, high, 1 - high], [0, 0, 0]]]
    )
