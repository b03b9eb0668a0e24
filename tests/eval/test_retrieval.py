"""In-context segmentation: the memory, the attention over it, and the command as a user runs it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DATA, Evaluation, few_of_voc
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from skipless.common import cli
from skipless.datasets.labels.masks import VOID
from skipless.datasets.labels.voc import voc_segmentation
from skipless.eval import retrieval as module
from skipless.eval.dense.outcome import Tally
from skipless.eval.retrieval import (
    Settings,
    changed_settings,
    draw_images,
    in_context_labels,
    make_search,
    sample_patches,
)

NAMES = ("background", "aeroplane", "bicycle")


@pytest.fixture
def retrieval(tiny_voc: Path, tiny_ckpt: Path, cache: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_ckpt}", "--data.name=voc12", f"--data.root={tiny_voc}", f"--cache={cache}", "--device=cpu"]
    return Evaluation(module, [*words, "--size=64", "--data.train_split=train"], request)


def units(seed: int, count: int, dim: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.02), (5, 0.02), (30, 0.5), (40, 0.02)])
def test_labels_are_those_of_a_plain_computation(k: int, temperature: float) -> None:
    memory, queries = units(0, 40, 6), units(1, 9, 6)
    labels = np.random.default_rng(2).dirichlet(np.ones(4), 40)
    search, _ = make_search(memory, k, exact=True, gpu=None)
    found = in_context_labels(*search(queries), labels, temperature)
    assert found.dtype == np.float32
    for query, of_query in zip(queries, found, strict=True):
        similarities = [float(np.dot(row.astype(float), query)) for row in memory]
        nearest = sorted(range(40), key=lambda row: -similarities[row])[:k]
        weights = [np.exp(similarities[row] / temperature) for row in nearest]
        expected = sum(w * labels[row] for w, row in zip(weights, nearest, strict=True)) / sum(weights)
        np.testing.assert_allclose(of_query, expected, atol=1e-5)
        np.testing.assert_allclose(of_query.sum(), 1, atol=1e-5)


@given(st.integers(0, 999), st.integers(1, 12), st.sampled_from([0.01, 0.02, 1.0, 50.0]))
def test_labels_lie_between_those_of_the_neighbors(seed: int, k: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    similarities = np.sort(rng.uniform(-1, 1, (7, k)).astype(np.float32))[:, ::-1]
    rows, labels = rng.integers(0, 20, (7, k)), rng.random((20, 3)).astype(np.float16)
    found = in_context_labels(similarities, rows, labels, temperature)
    assert (found <= labels[rows].max(1) + 1e-3).all()
    assert (found >= labels[rows].min(1) - 1e-3).all()
    flat = in_context_labels(np.zeros_like(similarities), rows, labels, temperature)
    np.testing.assert_allclose(flat, labels[rows].astype(float).mean(1), atol=1e-3)


def test_rows_that_an_inverted_file_did_not_find_have_no_weight() -> None:
    similarities = np.array([[0.9, -3.4028235e38]], np.float32)
    found = in_context_labels(similarities, np.array([[0, -1]]), np.eye(2), 0.02)
    np.testing.assert_array_equal(found, [[1, 0]])


def test_inverted_file_finds_what_is_close() -> None:
    """Twenty tight groups: the nearest rows of a query are those of its own group."""
    centers = units(0, 20, 16)
    memory = np.repeat(centers, 30, axis=0) + 0.01 * units(1, 600, 16)
    memory /= np.linalg.norm(memory, axis=1, keepdims=True)
    search, name = make_search(memory, 30, exact=False, gpu=None)
    assert name == "inverted file, 2 of 24 lists, on the CPU"
    _, rows = search(centers)
    own = [(of_query // 30 == group)[of_query >= 0].all() for group, of_query in enumerate(rows)]
    assert all(own)
    assert (rows >= 0).mean() > 0.8


def test_all_labeled_patches_are_kept_where_they_fit() -> None:
    shares = np.array([[1, 0], [0, 0], [0.5, 0.25], [0, 0]], np.float32)
    for count in (2, 3, 4):
        np.testing.assert_array_equal(sample_patches(shares, count, np.random.default_rng(0)), [0, 2])


def test_patches_of_rare_classes_are_preferred() -> None:
    """Ten patches of class 1 among 90 of class 0, ten places. Scores are uniform in [0, 90) and in [0, 10), so below t
    lie about 90 t / 90 and 10 t / 10 of them: the ten lowest lie below t = 5, five of each class."""
    shares = np.zeros((100, 2), np.float32)
    shares[:90, 0], shares[90:, 1] = 1, 1
    kept = [sample_patches(shares, 10, np.random.default_rng(seed)) for seed in range(200)]
    assert all(len(np.unique(rows)) == 10 and (np.diff(rows) > 0).all() for rows in kept)
    assert np.mean([(rows >= 90).sum() for rows in kept]) == pytest.approx(5, abs=0.5)
    np.testing.assert_array_equal(kept[3], sample_patches(shares, 10, np.random.default_rng(3)))


def test_a_patch_of_several_classes_has_the_sum_of_their_counts() -> None:
    """Four patches of class 0, four of class 1, four of both: eight hold each class, scores are 8 u, 8 u and 16 u. Near
    zero they lie as 8 / 8 to 4 / 16: the lowest is one of the last four in one case of five."""
    shares = np.zeros((12, 2), np.float32)
    shares[:4, 0], shares[4:8, 1], shares[8:] = 1, 1, 0.5
    kept = np.concatenate([sample_patches(shares, 1, np.random.default_rng(seed)) for seed in range(2000)])
    assert (kept >= 8).mean() == pytest.approx(1 / 5, abs=0.035)


def test_command_leaves_a_result_a_table_and_pictures(retrieval: Evaluation, tmp_path: Path) -> None:
    out = tmp_path / "out"
    retrieval.run("--every-block", "--out", out)
    result = json.loads((out / "retrieval.json").read_text())
    assert result["protocol"] == "voc12-retrieval/hummingbird (changed)"
    assert (result["dataset"], result["official_images"], result["settings"]["k"]) == ("voc12", 1449, 30)
    assert {"faiss-cpu", "faiss-gpu"} & set(result["versions"])
    details = result["details"]
    assert details["changed_settings"] == {"size": [512, 64], "data.train_split": ["trainaug", "train"]}
    assert (details["train_images"], details["memory_patches"], details["patches_per_image"]) == (12, 12 * 64, 64)
    assert (details["neighbours"], details["search"]) == (30, "exact, on the CPU")
    assert details["every_block"][-1]["miou"] == result["value"]

    # Colors are separable, but a patch of 8 pixels on a stretched image holds parts of two blocks.
    assert 0.7 < result["value"] <= details["pixel_accuracy"] < 1
    assert np.mean([details["iou"][name] for name in NAMES]) == pytest.approx(result["value"])
    assert all(value is None for name, value in details["iou"].items() if name not in NAMES)

    table = (out / "retrieval.md").read_text()
    assert "memory of 768 patches of 12 images (train), 30 neighbors, search exact, on the CPU; seed 0" in table
    assert "size 64 (published: 512); data.train_split train (published: trainaug)." in table
    assert f"| 2 | {100 * result['value']:.1f} |" in table
    assert f"| bicycle | {100 * details['iou']['bicycle']:.1f} |" in table
    assert "trained" not in table


class OneHot:
    """Features that are their patch's class code."""

    def __init__(self, masks: list[np.ndarray], grid: tuple[int, int], classes: int):
        self.images, self.grid, self.dim = len(masks), grid, classes
        step = masks[0].shape[0] // grid[0], masks[0].shape[1] // grid[1]
        # Void patches get the code of class 0.
        codes = [np.where(mask == VOID, 0, mask)[:: step[0], :: step[1]] for mask in masks]
        self.codes = torch.eye(classes, dtype=torch.float16)[torch.from_numpy(np.stack(codes)).long()]

    def read(self, rows: Any, blocks: Any) -> torch.Tensor:
        return self.codes[rows]


class Masks:
    """As much of a SegmentationSet as is needed."""

    name, split, classes = "toy", "val", ("a", "b", "c")

    def __init__(self, masks: list[np.ndarray]):
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def read_matched_mask(self, index: int) -> np.ndarray:
        return self.masks[index]


def test_class_codes_as_features_give_a_perfect_figure() -> None:
    """Also with void patches in the memory's images and in those that are measured. One label a patch, images as large
    as the grid: nothing is lost by resizing."""
    rng = np.random.default_rng(0)
    masks = [rng.choice([0, 1, 2, VOID], (6, 8)).astype(np.uint8) for _ in range(8)]
    train, val = Masks(masks[:4]), Masks(masks[4:])
    patches, labels = module.choose_patches(train, (6, 8), 48, 0, 0)  # type: ignore[arg-type]
    assert len(labels) == sum(int((mask != VOID).sum()) for mask in masks[:4])
    np.testing.assert_array_equal(labels.sum(1), 1)
    memory = module.build_memory(OneHot(masks[:4], (6, 8), 3), (0,), patches)  # type: ignore[arg-type]
    search, _ = make_search(memory, 30, exact=True, gpu=None)
    features, tally = OneHot(masks[4:], (6, 8), 3), Tally(1, 4, 3, torch.device("cpu"), [1])
    for index, mask, prediction in module.segment(features, (0,), val, search, labels, 0.02, torch.device("cpu")):  # type: ignore[arg-type]
        tally.add(0, index, mask, prediction)
    counts = np.bincount(np.concatenate(masks[4:]).ravel(), minlength=3)[:3]
    np.testing.assert_array_equal(tally.outcome().confusions[0], np.diag(counts))
    np.testing.assert_array_equal(tally.predictions[1], np.where(masks[5] == VOID, 0, masks[5]))


def test_labels_of_a_patch_are_shares_of_what_is_labeled() -> None:
    mask = np.array([[0, 0, 1, VOID], [0, 1, VOID, VOID]], np.uint8)
    patches, labels = module.choose_patches(Masks([mask]), (1, 2), 2, 0, 0)  # type: ignore[arg-type]
    np.testing.assert_array_equal(patches[0], [0, 1])
    np.testing.assert_array_equal(labels, [[0.75, 0.25, 0], [0, 1, 0]])


def test_same_seed_same_result(retrieval: Evaluation) -> None:
    """Also with features from the cache; another seed takes other patches."""
    flags = ["--memory_size=240", "--blocks=last4"]
    one, same, other = (retrieval.measure(*flags, f"--seed={seed}") for seed in (3, 3, 4))
    assert one["protocol"] == "voc12-retrieval/hummingbird/blocks-1-2 (changed)"
    assert (one["details"]["memory_patches"], one["details"]["patches_per_image"]) == (240, 20)
    assert (one["value"], one["details"]["iou"]) == (same["value"], same["details"]["iou"])
    assert one["value"] != other["value"]


def test_few_shots_are_the_mean_of_draws(retrieval: Evaluation, tiny_voc: Path, tmp_path: Path) -> None:
    """Each of three images of twelve, others for each seed, and the same again for the same."""
    train = voc_segmentation(tiny_voc, "train")
    drawn = [draw_images(train, 4, seed) for seed in (5, 6, 5)]
    assert drawn[0].names == drawn[2].names != drawn[1].names
    assert len(set(drawn[0].names)) == 3
    assert [path.stem for path in (*drawn[0].images, *drawn[0].masks)] == [*drawn[0].names] * 2
    assert len(draw_images(train, 99, 0)) == 1
    singles = [retrieval.measure("--share=4", f"--seed={seed}") for seed in (5, 6)]
    both = retrieval.written(tmp_path, "--share=4", "--seed=5", "--seeds=2", "--every-block")
    assert both["protocol"] == "voc12-retrieval/hummingbird/1-of-4 (changed)"
    values = [single["value"] for single in singles]
    assert both["value"] == pytest.approx(np.mean(values))
    assert both["details"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert both["details"]["every_block"][1]["miou"] == both["value"]
    assert both["details"]["memory_patches"] == 3 * 64
    iou = both["details"]["iou"]
    for name in NAMES:
        assert iou[name] == pytest.approx(np.mean([single["details"]["iou"][name] for single in singles]))
    assert "of 3 images (train, 1 of 4)" in (tmp_path / "retrieval.md").read_text()
    assert "give 1 or more of both" in retrieval.refused("--share=0")


def test_a_memory_of_fewer_patches_than_neighbors(retrieval: Evaluation) -> None:
    result = retrieval.measure("--memory_size=12", "--k=50")
    assert (result["details"]["memory_patches"], result["details"]["neighbours"]) == (12, 12)


def test_inverted_file_does_as_well(retrieval: Evaluation) -> None:
    exact, inverted = (retrieval.measure(f"--index={index}") for index in ("exact", "ivf"))
    assert inverted["details"]["search"] == "inverted file, 2 of 27 lists, on the CPU"
    assert inverted["value"] == pytest.approx(exact["value"], abs=0.1)


def test_large_memory_on_a_cpu_takes_an_inverted_file(retrieval: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EXACT_ON_CPU", 12 * 64 - 1)
    assert retrieval.measure()["details"]["search"].startswith("inverted file")
    assert retrieval.measure("--index=exact")["details"]["search"] == "exact, on the CPU"


def test_figures_are_of_the_labels_not_of_chance(retrieval: Evaluation, tiny_voc: Path, tmp_path: Path) -> None:
    """With the masks of validation exchanged among the images, little is left."""
    data = tmp_path / "VOCdevkit"
    shutil.copytree(tiny_voc, data)
    masks = Path("VOC2012", "SegmentationClass")
    for index in range(4):
        shutil.copy(tiny_voc / masks / f"val{(index + 1) % 4:02}.png", data / masks / f"val{index:02}.png")
    assert retrieval.measure("--data.root", data)["value"] < 0.4


def test_published_settings_are_not_changed() -> None:
    source = ["--ckpt=x", "--data.root=x"]
    assert changed_settings(cli.parse(Settings, [*source, "--data.name=scenes"])) == {}
    assert changed_settings(cli.parse(Settings, [*source, "--data.name=voc12", "--data.train_split=trainaug"])) == {}
    assert (
        changed_settings(cli.parse(Settings, [*source, "--data.name=voc12", "--workers=3", "--seed=3", "--index=ivf"]))
        == {}
    )
    changed = cli.parse(
        Settings, [*source, "--data.name=ade20k", "--memory-size=9", "--k=5", "--temperature=0.1", "--size=448"]
    )
    expected = {"size": [512, 448], "memory_size": [10_240_000, 9], "k": [30, 5], "temperature": [0.02, 0.1]}
    assert changed_settings(changed) == expected


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_a_trained_backbone_is_better_than_its_untrained_twin(retrieval: Evaluation, tmp_path: Path) -> None:
    """On 16 and 5 real photographs."""
    root = few_of_voc(tmp_path, {"train": 16, "val": 5})
    ckpt = Path(DATA or "", "weights/vit_small_patch14_saliency.safetensors")
    words = ["--data.root", root, "--ckpt", ckpt, "--cache", tmp_path / "cache", "--size=112"]
    trained, floor = (retrieval.measure(*words, *more) for more in ([], ["--untrained"]))
    assert trained["details"]["pixel_accuracy"] > floor["details"]["pixel_accuracy"]
    assert trained["value"] > 1.2 * floor["value"]


def test_memory_that_cannot_fit_is_refused(
    retrieval: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 x 64 patches of 192 channels of 4 bytes and 21 labels of 2."""
    need = 12 * 64 * (192 * 4 + 21 * 2)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": need - 1}.__getitem__)
    last = retrieval.refused("--cache", tmp_path / "cache")
    assert "a memory of 768 patches needs 0.0 GB" in last
    assert "smaller --memory-size" in last
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": need}.__getitem__)
    retrieval.measure("--cache", tmp_path / "cache")


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_mask_is_named(retrieval: Evaluation, tiny_voc: Path, tmp_path: Path, split: str) -> None:
    """Also when features are there already."""
    data = tmp_path / "VOCdevkit"
    shutil.copytree(tiny_voc, data)
    words = ["--data.root", data, "--cache", tmp_path / "cache"]
    flags = [*words, "--out", tmp_path / "out"]
    path = data / f"VOC2012/SegmentationClass/{split}03.png"
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    assert f"{split}03.png" in retrieval.refused(*flags)
    shutil.copy(tiny_voc / f"VOC2012/SegmentationClass/{split}03.png", path)
    retrieval.run(*words)
    Image.fromarray(np.full((64, 80), 33, np.uint8)).save(path)
    assert f"{split}03.png: 5120 of 5120 pixels hold 33" in retrieval.refused(*flags)
    assert not list(tmp_path.glob("out/*"))


def test_memory_of_void_alone_is_refused(retrieval: Evaluation, tiny_voc: Path, tmp_path: Path) -> None:
    data = tmp_path / "VOCdevkit"
    shutil.copytree(tiny_voc, data)
    for path in (data / "VOC2012/SegmentationClass").glob("train*.png"):
        Image.fromarray(np.full((64, 80), VOID, np.uint8)).save(path)
    assert "voc12 train has no labeled patch" in retrieval.refused("--data.root", data, "--cache", tmp_path / "cache")
