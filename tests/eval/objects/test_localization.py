"""LOST, TokenCut and MaskCut against plain loops with dense SciPy, against calculations by hand, and at their edges."""

import os
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipless.datasets.images import read_image
from skipless.eval.backbones import load_backbone, pad_to_patch
from skipless.eval.objects import localization
from skipless.eval.objects.localization import Localization, box_in_pixels, lost, maskcut, second_eigenvectors, tokencut

DATA = os.environ.get("SKIPLESS_TEST_DATA")

# The tests are not a package: a file beside them is run, not imported.
reference = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("discovery_reference.py"))))


def grid(picture: str) -> Tensor:
    """Features [1, h, w, 10] of a picture of digits: the same digit, the same direction; others are orthogonal; a dot
    has no features."""
    rows = [[np.zeros(10) if c == "." else np.eye(10)[int(c)] for c in line] for line in picture.split()]
    return torch.tensor(np.array(rows))[None]


def where(picture: str, digits: str) -> np.ndarray:
    """bool [h, w]: where the picture has one of the digits."""
    return np.array([[c in digits for c in line] for line in picture.split()])


@pytest.fixture(autouse=True)
def small_graphs_are_iterated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The iteration is what these tests are about; where it is used, at more than 200 patches, they would be slow."""
    monkeypatch.setattr(localization, "_SMALL", 64)


def clustered(h: int, w: int, clusters: int, noise: float, zeros: int, seed: int) -> Tensor:
    """float32 features [1, h, w, 12]: blobs around random centers, some patches without features."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(clusters, 12)) + rng.normal(size=12) * 0.3
    places = rng.uniform(size=(clusters, 2)) * (h, w)
    ys, xs = np.mgrid[:h, :w]
    nearest = np.argmin([(ys - y) ** 2 + (xs - x) ** 2 for y, x in places], axis=0)
    features = centers[nearest] + noise * rng.normal(size=(h, w, 12))
    features.reshape(h * w, 12)[rng.choice(h * w, zeros, replace=False)] = 0
    return torch.from_numpy(features.astype(np.float32))[None]


def random_features(largest_side: int) -> st.SearchStrategy[Tensor]:
    return st.builds(
        clustered,
        h=st.integers(2, largest_side),
        w=st.integers(2, largest_side),
        clusters=st.integers(2, 6),
        noise=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        zeros=st.integers(0, 2),
        seed=st.integers(0, 2**32 - 1),
    )


def assert_same(found: Localization, expected: SimpleNamespace) -> None:
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert (found.box, found.seed) == (expected.box, expected.seed)


@settings(max_examples=40)
@given(features=random_features(13), k=st.sampled_from([1, 5, 100]))
def test_lost_is_the_loop_of_the_paper(features: Tensor, k: int) -> None:
    (found,) = lost(features, k)
    assume(not found.degenerate)
    assert_same(found, reference.lost(features[0].numpy(), k))


@settings(max_examples=60)
@given(features=random_features(13), tau=st.sampled_from([0.0, 0.2, 0.5]))
@example(features=clustered(12, 13, 5, 0.5, 0, 0), tau=0.2)  # more patches than LAPACK is used for
def test_tokencut_is_the_dense_solution(features: Tensor, tau: float) -> None:
    (found,) = tokencut(features, tau)
    assume(not found.degenerate)
    expected = reference.tokencut(features[0].numpy(), tau)
    assume(expected.eigengap > 1e-6)  # else the eigenvector is arbitrary
    assert_same(found, expected)
    assert found.eigengap == pytest.approx(expected.eigengap, rel=1e-3)
    # Rounding in LAPACK grows with the inverse of the gap.
    x = expected.vector / expected.vector.flat[expected.seed]
    np.testing.assert_allclose(found.map, x, atol=1e-8 + 1e-12 / expected.eigengap)


@settings(max_examples=60)
@given(features=random_features(13), tau=st.sampled_from([0.0, 0.15, 0.5]), n=st.integers(1, 4))
@example(features=clustered(12, 13, 5, 0.5, 0, 0), tau=0.15, n=3)
def test_maskcut_is_the_dense_solution(features: Tensor, tau: float, n: int) -> None:
    (found,) = maskcut(features, n, tau)
    assume(not found[0].degenerate)
    expected, eigengap = reference.maskcut(features[0].numpy(), n, tau)
    assume(eigengap > 1e-6)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def graph(kind: str, n: int) -> np.ndarray:
    """Adjacency of graphs that are hard to iterate on, float64 [n, n] with ones on the diagonal."""
    rng = np.random.default_rng(0)
    if kind == "two groups and a few edges between them":
        side = np.arange(n) < n // 3
        similar = (side[:, None] == side) | (rng.uniform(size=(n, n)) < 2 / n**2)
    elif kind == "groups without an edge between them":
        group = np.searchsorted([0.5, 0.8, 0.95], np.arange(n) / n, side="right")
        similar = group[:, None] == group
    elif kind == "a band":
        similar = abs(np.subtract.outer(np.arange(n), np.arange(n))) < n // 20
    elif kind == "all but one edge":
        similar = np.ones((n, n), bool)
        similar[3, 7] = False
    else:
        similar = rng.uniform(size=(n, n)) < 0.1
    similar = similar & similar.T
    np.fill_diagonal(similar, True)
    return similar.astype(np.float64)


@pytest.mark.parametrize(
    "kind",
    [
        "random",
        "two groups and a few edges between them",
        "groups without an edge between them",
        "a band",
        "all but one edge",
    ],
)
@pytest.mark.parametrize("n", [40, 200])
def test_second_eigenvector(kind: str, n: int) -> None:
    similar = graph(kind, n)
    weights = np.where(similar > 0, 1.0, 1e-5)
    expected, eigengap = reference.dense_solve(weights)
    ((x, gap, residual, fallback),) = second_eigenvectors(torch.from_numpy(similar)[None])
    assert not fallback
    assert residual < 1e-10
    assert gap == pytest.approx(eigengap, abs=1e-9)
    x, expected = x / np.linalg.norm(x), expected / np.linalg.norm(expected)
    assert 1 - abs(x @ expected) < 1e-12


def test_a_double_eigenvalue_shows_in_the_eigengap() -> None:
    # Three groups of the same size without an edge between them: by symmetry the eigenvalue is a double one.
    similar = torch.block_diag(*[torch.ones(40, 40)] * 3).double()
    ((_, eigengap, residual, _),) = second_eigenvectors(similar[None])
    assert abs(eigengap) < 1e-12
    assert residual < 1e-10


def test_dense_solver_steps_in_where_the_iteration_does_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.cat([clustered(12, 13, 5, 0.5, 0, seed) for seed in range(2)])
    expected = tokencut(features)
    monkeypatch.setattr(localization, "_MAX_STEPS", 3)
    found = tokencut(features)
    for one, other in zip(found, expected, strict=True):
        assert (one.fallback, other.fallback) == (True, False)
        assert one.residual is not None
        assert one.residual < 1e-12
        assert one.eigengap == pytest.approx(other.eigengap, abs=1e-9)
        assert_same(one, other)  # type: ignore[arg-type]


def test_outcome_does_not_depend_on_the_sign_of_the_eigenvector(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [
        clustered(h, w, 4, noise, 0, seed) for h, w, noise, seed in [(9, 9, 0.5, 0), (5, 8, 0, 1), (8, 12, 1, 2)]
    ]
    expected = [(tokencut(f)[0], *maskcut(f)[0]) for f in batches]
    solve = localization.second_eigenvectors
    monkeypatch.setattr(localization, "second_eigenvectors", lambda a: [(-x, *rest) for x, *rest in solve(a)])
    for f, others in zip(batches, expected, strict=True):
        for one, other in zip((tokencut(f)[0], *maskcut(f)[0]), others, strict=True):
            assert_same(one, other)  # type: ignore[arg-type]
            np.testing.assert_array_equal(one.map, other.map)


# Without edges between groups, the eigenvector is constant on groups: x_g = c / (N - l n_g) for a group of n_g patches,
# with the l, between N / 87 and N / 9 here, that makes sum_g n_g / (N - l n_g) = 1. For 87, 9 and 4 patches l = 10.15,
# and x is -0.01, 1 and 0.15 times its largest entry, 0.08 in the mean: both blobs are foreground, and 1 is the seed's.
TWO_BLOBS = """
    0000000000 0000000000 0011100000 0011100000 0011100000
    0000000000 0000000220 0000000220 0000000000 0000000000"""
AT_THE_BORDER = """
    0000000000 0000000000 0000000011 0000000111 0000000111
    0000000111 0000000000 0000000000 0000000000 0000000000"""
# The frame's 36 patches are fewer than the 64 inside: it has the largest entries, and all four corners.
FRAME = "1111111111 " + 8 * "1000000001 " + "1111111111"
DIAGONAL = """
    0000000000 0110000000 0110000000 0001100000 0001100000
    0000000000 0000000000 0000000000 0000000000 0000000000"""


def test_tokencut_takes_the_larger_of_two_blobs() -> None:
    (found,) = tokencut(grid(TWO_BLOBS))
    np.testing.assert_array_equal(found.mask, where(TWO_BLOBS, "1"))
    assert found.box == (2, 2, 5, 5)
    assert found.seed == 22  # the first of nine ties
    levels = [found.map[0, 0], found.map[6, 7], found.map[2, 2]]
    np.testing.assert_allclose(levels, [-0.011, 0.146, 1], atol=1e-3)
    assert found.edges == pytest.approx((87 * 86 + 9 * 8 + 4 * 3) / (100 * 99))
    assert not found.degenerate


def test_maskcut_takes_two_blobs_and_no_third() -> None:
    # Without the first blob's features, 4 against 87 patches: the second blob. Then only the background has features,
    # and the patches without stand out: the first blob again, of which nothing is left to return.
    (found,) = maskcut(grid(TWO_BLOBS))
    assert [one.box for one in found] == [(2, 2, 5, 5), (7, 6, 9, 8)]
    for one, digit in zip(found, "12", strict=True):
        np.testing.assert_array_equal(one.mask, where(TWO_BLOBS, digit))


@pytest.mark.parametrize("method", [tokencut, lambda f: maskcut(f)[0][:1]])
def test_a_blob_that_touches_the_border(method) -> None:  # type: ignore[no-untyped-def]
    (found,) = method(grid(AT_THE_BORDER))
    np.testing.assert_array_equal(found.mask, where(AT_THE_BORDER, "1"))
    assert found.box == (7, 2, 10, 6)
    assert box_in_pixels(found.box, 16, 155, 160) == (112, 32, 160, 96)


def test_only_maskcut_swaps_a_side_with_the_corners() -> None:
    (cut,) = tokencut(grid(FRAME))
    np.testing.assert_array_equal(cut.mask, where(FRAME, "1"))
    found = maskcut(grid(FRAME), n=1)[0][0]
    np.testing.assert_array_equal(found.mask, where(FRAME, "0"))
    assert (found.box, found.seed) == ((1, 1, 9, 9), 11)
    assert found.map[1, 1] > 0 > found.map[0, 0]


def test_components_do_not_join_at_corners() -> None:
    (found,) = tokencut(grid(DIAGONAL.replace("0", "5")))
    assert (found.box, found.seed) == ((1, 1, 3, 3), 11)


def test_maskcut_accepts_in_the_third_round_what_it_rejected_in_the_second() -> None:
    # Round 2 finds the 18 patches of round 1 and 4 more: IoU 18 / 22, rejected. Round 3 finds the same, and is compared
    # with nothing, as in the release: the 4 are returned.
    features = clustered(8, 9, 4, 0.5, 0, 14)
    assert [len(maskcut(features, n)[0]) for n in (1, 2, 3)] == [1, 1, 2]
    found = maskcut(features)[0]
    assert [one.mask.sum() for one in found] == [18, 4]
    for one, other in zip(found, reference.maskcut(features[0].numpy())[0], strict=True):
        assert_same(one, other)


def test_lost_by_hand() -> None:
    # Vectors in the plane, dot products by sight. Degrees, without itself: p0 (1, 0): p1, p3 -> 2; p1 (1, 1): p0, p2,
    # p3 -> 3; p2 (0, 1): p1, p3 -> 2; p3 (1, 2): p0, p1, p2 -> 3; p4 (-1, -1): none -> 0 ...
    features = torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 2], [-1, -1], [-2, 1]]).reshape(1, 2, 3, 2)
    # ... and p5 (-2, 1): p2 and p4 (product 1) -> 2; so p4: p5 -> 1, p2: p1, p3, p5 -> 3, and p3 . p5 = 0 is no edge.
    (found,) = lost(features)
    np.testing.assert_array_equal(found.map, [[2, 3, 3], [3, 1, 2]])
    assert found.seed == 4
    assert found.edges == pytest.approx(14 / 30)
    # Similar to p4: itself and p5, with sum (-3, 0): positive with p4 (3) and p5 (6) only.
    np.testing.assert_array_equal(found.mask, [[False, False, False], [False, True, True]])
    assert found.box == (1, 1, 3, 2)


def test_lost_breaks_ties_at_rank_k_by_index() -> None:
    features = torch.tensor([[2.0, 3], [2, -1], [2, 1], [-1, 1]]).reshape(1, 1, 4, 2)
    # Products: 01: 1, 02: 7, 03: 1, 12: 3, 13: -3, 23: -1. Degrees 3, 2, 2, 1: order 3, 1, 2, 0. The seed 3 is similar
    # to 0 only. With k = 3 the sum is the seed itself, positive with 0 and 3, which do not touch. With k = 4 it is
    # (1, 4), whose products are 14, -2, 6, 3.
    np.testing.assert_array_equal(lost(features, k=3)[0].mask, [[False, False, False, True]])
    np.testing.assert_array_equal(lost(features, k=4)[0].mask, [[False, False, True, True]])
    # Products: 01: 1, 02: 1, 12: -4. Degrees 2, 1, 1: order 1, 2, 0. The seed is the first of two ties; with k = 2 the
    # other one is in the list, and not similar.
    features = torch.tensor([[1.0, 0], [1, 2], [1, -2.5]]).reshape(1, 1, 3, 2)
    assert lost(features)[0].seed == 1
    np.testing.assert_array_equal(lost(features, k=2)[0].mask, [[True, True, False]])


def test_box_is_clamped_to_the_unpadded_image() -> None:
    # 500 x 375 pixels are 32 x 24 patches of 16, padded to 512 x 384.
    assert box_in_pixels((3, 2, 32, 24), 16, height=375, width=500) == (48, 32, 500, 375)
    assert box_in_pixels((0, 0, 31, 23), 16, height=375, width=500) == (0, 0, 496, 368)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (5, 7), (12, 12)])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_where_all_patches_are_alike_the_object_is_the_whole_image(shape: tuple[int, int], value: float) -> None:
    features = torch.full((2, *shape, 4), value)
    for method in (lost, tokencut, maskcut):
        for found in method(features):
            one = found[0] if isinstance(found, list) else found
            assert isinstance(found, Localization) or len(found) == 1
            assert one.mask.shape == shape
            assert one.mask.all()
            assert (one.box, one.seed) == ((0, 0, shape[1], shape[0]), 0)
            assert one.degenerate == (method is not lost or value == 0)
            assert one.edges == (value if shape != (1, 1) else 1)


def test_two_different_patches() -> None:
    (found,) = tokencut(grid("12"))
    np.testing.assert_array_equal(found.mask, [[True, False]])
    np.testing.assert_allclose(found.map, [[1, -1]], atol=1e-12)
    assert not found.degenerate


def test_a_bias_that_dwarfs_the_keys_makes_the_graph_complete() -> None:
    features = clustered(9, 9, 4, 0.5, 0, 0)
    assert tokencut(features)[0].edges < 0.7
    (biased,) = tokencut(features + 100)
    assert (biased.edges, biased.degenerate) == (1, True)
    assert lost(features + 100)[0].edges == 1


@pytest.mark.parametrize("method", [lost, tokencut, maskcut])
def test_a_batch_is_its_images_one_by_one(method) -> None:  # type: ignore[no-untyped-def]
    batch = torch.cat([clustered(9, 11, 4, 0.3, 0, seed) for seed in range(3)] + [torch.ones(1, 9, 11, 12)])
    together = method(batch)
    assert method(batch[:0]) == []
    for i, found in enumerate(together):
        (alone,) = method(batch[i : i + 1])
        pairs = zip(found, alone, strict=True) if isinstance(found, list) else [(found, alone)]
        for one, other in pairs:
            assert_same(one, other)
            np.testing.assert_array_equal(one.map, other.map)


def test_groups_of_several_images_are_solved_as_single_ones() -> None:
    # What a GPU does with a batch, an image without structure among them.
    adjacency = [graph("random", 150), graph("a band", 150), np.ones((150, 150))]
    together = second_eigenvectors(torch.from_numpy(np.stack(adjacency)))
    for i in (0, 1):
        ((x, gap, _, _),) = second_eigenvectors(torch.from_numpy(adjacency[i])[None])
        other, other_gap = together[i][0], together[i][1]
        assert gap == pytest.approx(other_gap, abs=1e-9)
        assert abs(x @ other) / np.linalg.norm(x) / np.linalg.norm(other) > 1 - 1e-12


def test_precision_of_the_surroundings_does_not_matter() -> None:
    features = clustered(9, 11, 4, 0.5, 0, 3).bfloat16().requires_grad_()
    expected = tokencut(features.detach().double())[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(tokencut(features)[0], expected)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA")
@pytest.mark.parametrize("method", [lost, tokencut, maskcut])
def test_gpu_finds_what_the_cpu_finds(method) -> None:  # type: ignore[no-untyped-def]
    batch = torch.cat([clustered(15, 17, 5, 0.5, 0, seed) for seed in range(4)])
    for found, expected in zip(method(batch.cuda()), method(batch), strict=True):
        pairs = zip(found, expected, strict=True) if isinstance(found, list) else [(found, expected)]
        for one, other in pairs:
            assert_same(one, other)


@pytest.mark.parametrize("method", [lost, tokencut, maskcut])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite(method, value: float) -> None:  # type: ignore[no-untyped-def]
    features = torch.rand(3, 4, 5, 6)
    features[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match=r"image 1 of the batch hold NaN or infinite values"):
        method(features)


@pytest.mark.parametrize("method", [lost, tokencut, maskcut])
@pytest.mark.parametrize(
    "features", [torch.rand(4, 5, 6), torch.ones(1, 4, 5, 6, dtype=torch.long), torch.rand(1, 0, 5, 6)]
)
def test_features_of_another_shape(method, features: Tensor) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"give floating-point patch features \[B, h, w, D\]"):
        method(features)


def test_settings_out_of_range() -> None:
    features = torch.rand(1, 4, 5, 6)
    with pytest.raises(ValueError, match="k is 0"):
        lost(features, k=0)
    with pytest.raises(ValueError, match="n is 0"):
        maskcut(features, n=0)
    for method in (tokencut, maskcut):
        with pytest.raises(ValueError, match=r"tau is 1\.5"):
            method(features, tau=1.5)


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_real_images() -> None:
    root = Path(DATA or "")
    backbone = load_backbone(root / "weights" / "vit_small_patch14_saliency.safetensors")
    for path in sorted((root / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("*.jpg"))[:2]:
        images = pad_to_patch(backbone.normalize(read_image(path)[None]), backbone.patch)
        with torch.inference_mode():
            keys = backbone.features(images, kind="keys_without_bias")[0].patches
        features = keys[0].numpy()
        assert_same(lost(keys)[0], reference.lost(features))
        (found,) = tokencut(keys)
        assert_same(found, reference.tokencut(features))
        assert not found.fallback
        small = F.avg_pool2d(keys.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        expected, _ = reference.maskcut(small[0].numpy())
        for one, other in zip(maskcut(small)[0], expected, strict=True):
            assert_same(one, other)


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_trained_key_bias_makes_the_graph_complete() -> None:
    root = Path(DATA or "")
    backbone = load_backbone(root / "weights" / "vit_small_patch14_saliency.safetensors")
    path = min((root / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("*.jpg"))
    images = pad_to_patch(backbone.normalize(read_image(path)[None]), backbone.patch)
    with torch.inference_mode():
        keys = backbone.features(images, kind="keys")[0].patches
    assert tokencut(keys)[0].degenerate
    assert lost(keys)[0].mask.all()
