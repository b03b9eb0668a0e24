"""Unsupervised segmentation: components, k-means, matching, and the command as a user runs it."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DATA, Evaluation, few_of_voc, write_voc
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler

from skipless.datasets.labels.masks import VOID
from skipless.eval import clustering as module
from skipless.eval.clustering import (
    cluster_confusion,
    kmeans,
    match_clusters,
    merge_clusters,
    sample_grid,
    standardized_components,
)

NAMES = ("background", "disc", "star")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of scenes, 6 pictures of 64 x 64: blocks of three colors, each a class."""
    root = write_voc(tmp_path_factory.mktemp("data") / "VOCdevkit", {"val": 6}, blocks=(4, 4), void=False)
    (root / "VOC2012/classes.txt").write_text("disc\nstar\n")
    return root


@pytest.fixture
def clustering(scenes: Path, tiny_ckpt: Path, cache: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_ckpt}", "--data.name=scenes", f"--data.root={scenes}", f"--cache={cache}", "--device=cpu"]
    return Evaluation(module, [*words, "--size=64"], request)


def iou_of(confusion: np.ndarray, label: int, cluster: int) -> float:
    both = confusion[label, cluster]
    either = confusion[label].sum() + confusion[:, cluster].sum() - both
    return both / either if either else 0.0


@given(st.integers(1, 6), st.integers(0, 10**6), st.sampled_from([0, 3, 100]))
def test_matching_is_the_best_of_all_permutations(classes: int, seed: int, most: int) -> None:
    confusion = np.random.default_rng(seed).integers(0, most + 1, (classes, classes))
    class_of = match_clusters(confusion)
    assert sorted(class_of) == list(range(classes))
    found = sum(iou_of(confusion, label, cluster) for cluster, label in enumerate(class_of))
    best = max(
        sum(iou_of(confusion, label, cluster) for cluster, label in enumerate(order))
        for order in itertools.permutations(range(classes))
    )
    assert found == pytest.approx(best, abs=1e-12)


@given(st.integers(1, 12), st.integers(0, 10**6))
def test_renamed_clusters_are_named_back(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, 40)]).astype(np.uint8)[None]
    name = rng.permutation(classes)
    confusion = cluster_confusion(labels, name[labels], classes, classes)
    class_of = match_clusters(confusion)
    np.testing.assert_array_equal(class_of[name], np.arange(classes))
    np.testing.assert_array_equal(merge_clusters(confusion, class_of), np.diag(np.bincount(labels[0])))


def test_total_iou_counts_not_pixels() -> None:
    """Pixels agree most on the diagonal, 60 + 0. IoU: 60 / 130 + 0 there; 30 / 90 + 40 / 110 across is more."""
    confusion = np.array([[60, 30], [40, 0]])
    np.testing.assert_array_equal(match_clusters(confusion), [1, 0])


def test_each_of_many_clusters_goes_to_the_class_it_is_most_of() -> None:
    """Cluster 1 is most of class 0, though half of class 1 is in it and less than a tenth of class 0. Cluster 2 is
    empty, and cluster 3 equally much of both."""
    confusion = np.array([[90, 6, 0, 4, 0], [2, 5, 0, 4, 1]])
    class_of = match_clusters(confusion)
    np.testing.assert_array_equal(class_of, [0, 0, 0, 0, 1])
    np.testing.assert_array_equal(merge_clusters(confusion, class_of), [[100, 0], [11, 1]])


def test_void_is_not_counted() -> None:
    labels, found = np.array([[[0, 1], [VOID, 1]]], np.uint8), np.array([[[2, 0], [1, 0]]])
    np.testing.assert_array_equal(cluster_confusion(labels, found, 2, 3), [[0, 0, 1], [2, 0, 0]])


def test_points_are_the_centers_of_cells() -> None:
    """Centers of 2 cells on 3 and on 5 pixels: at 1/4 and 3/4 of the side, so in pixels 0 and 2, and in 1 and 3."""
    grid = np.arange(15).reshape(3, 5)
    np.testing.assert_array_equal(sample_grid(grid, 2), [[1, 3], [11, 13]])
    several = np.stack([grid, grid + 100])
    np.testing.assert_array_equal(sample_grid(several, 2)[1], [[101, 103], [111, 113]])
    np.testing.assert_array_equal(sample_grid(np.array([[7]]), 3), np.full((3, 3), 7))


class Stored:
    """Features in memory."""

    def __init__(self, x: np.ndarray):
        self.images, self.grid, self.dim = len(x), x.shape[1:3], x.shape[3]
        self.x = torch.from_numpy(x.astype(np.float16))

    def read(self, rows: Any, blocks: Any) -> torch.Tensor:
        return self.x[rows]


def test_components_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3, 5, 60)) @ rng.standard_normal((60, 60)) + 3
    x[..., 7] = 0.5  # a channel that never changes
    stored = Stored(x)
    flat = stored.x.numpy().reshape(-1, 60).astype(float)
    expected = PCA(50, svd_solver="full").fit_transform(StandardScaler().fit_transform(flat))
    found = standardized_components(stored, (0,))  # type: ignore[arg-type]
    assert found.dtype == np.float32
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-4)
    few = standardized_components(Stored(x[..., :4]), (0,))  # type: ignore[arg-type]
    assert few.shape == (600, 4)


def test_clear_groups_are_found_and_seeds_repeat() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, 400)
    x = (10 * rng.standard_normal((5, 8))[group] + 0.01 * rng.standard_normal((400, 8))).astype(np.float32)
    found = kmeans(x, 5, seed=3)
    assert len(set(zip(group, found, strict=True))) == len(set(found)) == 5
    noise = rng.standard_normal((3000, 8)).astype(np.float32)
    one, same, other = (kmeans(noise, 9, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


def test_as_many_clusters_as_vectors() -> None:
    assert sorted(kmeans(np.eye(4, dtype=np.float32), 4, seed=0)) == [0, 1, 2, 3]


def test_command_leaves_a_result_a_table_and_pictures(
    clustering: Evaluation, scenes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    clustering.run("--every-block", "--seed=7", "--out", out)
    printed = capfd.readouterr()
    assert "WARNING" not in printed.err + printed.out  # faiss's of small sets
    result = json.loads((out / "clustering.json").read_text())
    assert (result["dataset"], result["protocol"]) == ("scenes", "scenes-clustering/kmeans-3 (changed)")
    assert {"faiss-cpu", "faiss-gpu"} & set(result["versions"])
    details = result["details"]
    assert details["changed_settings"] == {"size": [448, 64]}
    assert (details["clusters"], details["matching"]) == (3, "one to one")
    assert [run["seed"] for run in details["runs"]] == [7, 8, 9, 10, 11]
    figures = [run["miou"] for run in details["runs"]]
    assert result["value"] == pytest.approx(np.mean(figures))
    assert details["std"] == pytest.approx(np.std(figures, ddof=1))
    assert details["every_block"][-1]["miou"] == result["value"]
    assert np.mean([details["iou"][name] for name in NAMES]) == pytest.approx(result["value"])
    # Colors are separable, and a patch holds one color.
    assert 0.9 < result["value"] <= 1

    table = (out / "clustering.md").read_text()
    assert "3 clusters, matched one to one; 5 runs of k-means: " in table
    assert "size 64 (published: 448)." in table
    assert f"| 2 | {100 * result['value']:.1f} |" in table
    assert f"| star | {100 * details['iou']['star']:.1f} |" in table
    assert "trained" not in table


def test_same_seed_same_bits(clustering: Evaluation, scenes: Path) -> None:
    flags = ["--clusters=9", "--seeds=2", "--blocks=1"]
    one, same, other = (clustering.measure(*flags, f"--seed={seed}") for seed in (3, 3, 20))
    assert one["protocol"] == "scenes-clustering/kmeans-9/blocks-1 (changed)"
    assert one["details"] == same["details"]
    assert one["details"]["matching"] == "many to one"
    assert one["details"]["runs"] != other["details"]["runs"]
    # Runs are told apart by their seed alone.
    next_one = clustering.measure("--clusters=9", "--seeds=1", "--blocks=1", "--seed=4")
    assert next_one["value"] == one["details"]["runs"][1]["miou"]
    assert next_one["details"]["std"] is None


def test_figures_are_of_the_labels_not_of_chance(clustering: Evaluation, scenes: Path, tmp_path: Path) -> None:
    """Truth that has nothing to do with the colors."""
    root = tmp_path / "VOC2012"
    (root / "SegmentationClass").mkdir(parents=True)
    for name in ("JPEGImages", "ImageSets", "classes.txt"):
        (root / name).symlink_to(scenes / "VOC2012" / name)
    rng = np.random.default_rng(9)
    for path in sorted((scenes / "VOC2012/SegmentationClass").iterdir()):
        labels = np.kron(rng.integers(0, 3, (4, 4)), np.ones((16, 16))).astype(np.uint8)
        Image.fromarray(labels).save(root / "SegmentationClass" / path.name)
    assert clustering.measure("--data.root", root)["value"] < 0.45


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_a_trained_backbone_is_better_than_its_untrained_twin(clustering: Evaluation, tmp_path: Path) -> None:
    """On 12 real photographs."""
    root, ckpt = few_of_voc(tmp_path, {"val": 12}), Path(DATA or "", "weights/vit_small_patch14_saliency.safetensors")
    words = ["--data.name=voc12", "--data.root", root, "--ckpt", ckpt, "--cache", tmp_path / "cache"]
    words += ["--size=112", "--clusters=60", "--seeds=2"]
    trained, floor = (clustering.measure(*words, *more) for more in ([], ["--untrained"]))
    assert trained["protocol"] == "voc12-clustering/kmeans-60 (changed)"
    assert trained["value"] > 1.2 * floor["value"]


def test_damaged_mask_is_named_when_features_are_there_already(
    clustering: Evaluation, scenes: Path, tmp_path: Path
) -> None:
    clustering.measure("--seeds=1")
    path = scenes / "VOC2012/SegmentationClass/val03.png"
    whole = path.read_bytes()
    try:
        Image.fromarray(np.full((64, 64), 33, np.uint8)).save(path)
        assert "val03.png: 4096 of 4096 pixels hold 33" in clustering.refused("--seeds=1", "--out", tmp_path / "out")
    finally:
        path.write_bytes(whole)
    assert not (tmp_path / "out").exists()
