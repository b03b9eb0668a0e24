"""k-NN classification: neighbors, votes and the command, against scikit-learn and plain loops."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import DATA, ROOT, Evaluation, color_pictures
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import datasets as hf
from skipless.common import cli
from skipless.common.pixels import center_crop
from skipless.datasets.images import read_image
from skipless.datasets.labels.classes import LabeledData, class_folders
from skipless.eval import knn as module
from skipless.eval.backbones import Backbone, choose_blocks, load_backbone
from skipless.eval.classification import pooled_features, vectors
from skipless.eval.evaluation import prepare
from skipless.eval.knn import Settings, protocol_id
from skipless.eval.neighbors import knn_predict, nearest, torch_search
from skipless.ssl.model.vit import VisionTransformer

CLASSES = ("blue", "green", "red")


@pytest.fixture
def knn(color_classes: Path, tiny_run: Path, cache: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_run}", f"--data.root={color_classes}", f"--cache={cache}", "--device=cpu"]
    return Evaluation(module, [*words, "--size=32", "--k=[5]"], request)


def cosines(bank: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """float64 [M, N], one pair at a time."""
    found = np.zeros((len(queries), len(bank)))
    for i, query in enumerate(queries.astype(float)):
        for j, row in enumerate(bank.astype(float)):
            lengths = np.sqrt((query**2).sum() * (row**2).sum())
            found[i, j] = (query * row).sum() / lengths if lengths else 0.0
    return found


@given(st.integers(0, 999), st.integers(1, 30), st.integers(1, 6), st.integers(1, 9), st.data())
@settings(max_examples=40)
def test_nearest_is_an_exhaustive_search(seed: int, n: int, m: int, dim: int, data: st.DataObject) -> None:
    """Whatever the lengths; some vectors have none."""
    k = data.draw(st.integers(1, n))
    rng = np.random.default_rng(seed)
    bank, queries = (rng.standard_normal((count, dim)) * rng.choice([0, 1, 1e-3, 1e3], (count, 1)) for count in (n, m))
    before = bank.copy(), queries.copy()
    similarities, rows = nearest(bank, queries, k)
    assert (similarities.dtype, rows.dtype, similarities.shape, rows.shape) == (np.float32, np.int64, (m, k), (m, k))
    expected = cosines(bank, queries)
    np.testing.assert_allclose(similarities, -np.sort(-expected)[:, :k], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(expected, rows, 1), similarities, atol=1e-5)
    assert all(len(set(of_query)) == k for of_query in rows.tolist())
    np.testing.assert_array_equal(bank, before[0])
    np.testing.assert_array_equal(queries, before[1])


def test_vectors_without_length_are_like_nothing() -> None:
    bank = np.array([[0, 0], [1, 0], [-1, 0]], np.float32)
    similarities, rows = nearest(bank, np.array([[2, 0], [0, 0]], np.float32), 3)
    np.testing.assert_array_equal(similarities, [[1, 0, -1], [0, 0, 0]])
    np.testing.assert_array_equal(rows[0], [1, 0, 2])


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError"])
def test_without_faiss_torch_finds_the_same(error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, queries = (np.random.default_rng(seed).standard_normal((50, 6), np.float32) for seed in (0, 1))
    expected = nearest(bank, queries, 5)
    (tmp_path / "faiss.py").write_text(f"raise {error}('no libcublas.so.12')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faiss")
    similarities, rows = nearest(bank, queries, 5)
    np.testing.assert_allclose(similarities, expected[0], atol=1e-6)
    np.testing.assert_array_equal(rows, expected[1])
    in_parts = torch_search(torch.from_numpy(bank), queries, 5, largest=150)[1]
    np.testing.assert_array_equal(in_parts, np.argsort(-queries @ bank.T, axis=1)[:, :5])


@given(st.integers(0, 9999), st.integers(1, 60), st.integers(1, 12), st.sampled_from([0.02, 0.07, 1.0]))
@settings(max_examples=60)
def test_votes_are_scikit_learns(seed: int, n: int, classes: int, temperature: float) -> None:
    rng = np.random.default_rng(seed)
    bank, queries, k = rng.standard_normal((n, 4)), rng.standard_normal((7, 4)), int(rng.integers(1, n + 1))
    labels = rng.integers(0, classes, n)
    classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / temperature))
    expected = classifier.fit(bank, labels).predict(queries)
    distances, rows = classifier.kneighbors(queries)
    np.testing.assert_array_equal(knn_predict(1 - distances, labels[rows], classes, temperature), expected)
    similarities, rows = nearest(bank, queries, k)
    votes = knn_predict(similarities, labels[rows], classes, temperature)
    assert votes.dtype == np.int64
    np.testing.assert_array_equal(votes, expected)


def test_votes_by_hand() -> None:
    """Relative to the nearest at 0.9: exp(-0.04 / 0.07) + exp(-0.05 / 0.07) = 0.565 + 0.490 outvotes 1, and
    exp(-0.05 / 0.07) + exp(-0.06 / 0.07) = 0.490 + 0.424 does not. Equal votes go to the lower class."""
    similarities = np.array([[0.9, 0.86, 0.85], [0.9, 0.85, 0.84], [0.5, 0.5, 0.1]])
    labels = np.array([[1, 0, 0], [1, 0, 0], [3, 2, 4]])
    np.testing.assert_array_equal(knn_predict(similarities, labels, 5), [0, 1, 2])
    # Weights of exp(1 / 0.001), beyond what a float can hold.
    np.testing.assert_array_equal(knn_predict(similarities + 0.1, labels, 5, temperature=0.001), [1, 1, 2])


def reference(backbone: Backbone, images: list[np.ndarray], size: int, resize: int) -> dict[str, list[np.ndarray]]:
    """CLS and mean patch of central crops for each block, [blocks][N, D]."""
    crops = np.stack([center_crop(image, size, resize) for image in images])
    found = backbone.features(backbone.normalize(crops), range(backbone.depth))
    return {"cls": [f.cls.numpy() for f in found], "mean": [f.patches.flatten(1, 2).mean(1).numpy() for f in found]}


def test_vectors_are_class_tokens_means_or_both(color_classes: Path, tiny_run: Path, cache: Path) -> None:
    """224 pixels of 256, in proportion: 35 is made 32, whose 8/7 is 37."""
    backbone, images = load_backbone(tiny_run), class_folders(color_classes, "val")
    settings = Settings(
        str(tiny_run), LabeledData(str(color_classes)), blocks="2,1", cache=str(cache), device="cpu", batch_size=4
    )
    features = pooled_features(prepare(settings, "knn"), images, 35)
    cls, mean = reference(backbone, [read_image(path) for path in images.places], 32, 37).values()
    for pool, expected in (("cls", cls), ("mean", mean)):
        found = vectors(features, (1, 0), pool)  # type: ignore[arg-type]
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found, np.hstack([expected[1], expected[0]]), atol=4e-3)
    both = vectors(features, (0, 1), "both", np.array([7, 2]))
    np.testing.assert_allclose(both, np.hstack([*cls, *mean])[[7, 2]], atol=4e-3)


def test_command_leaves_a_result_and_a_table(knn: Evaluation, color_classes: Path, tmp_path: Path) -> None:
    """On a Hugging Face dataset, started from this repository, whose folder `datasets` is not that package."""
    hf.disable_progress_bars()
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(CLASSES))})
    splits = {}
    for split, own in (("train", "train"), ("validation", "val")):
        with np.load(color_classes / f"{own}.npz") as file:
            columns = {"image": [Image.fromarray(image) for image in file["images"]], "label": file["labels"].tolist()}
        splits[split] = hf.Dataset.from_dict(columns, features=features)
    hf.DatasetDict(splits).save_to_disk(str(tmp_path / "colors"))
    flags = [f"--data.root={tmp_path / 'colors'}", "--data.name", "huggingface", "--k", "[5,3,1]", "--every-block"]
    script = [sys.executable, "eval/knn.py", *knn.line(*flags, "--workers=1", "--out", tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, script)), capture_output=True, text=True, timeout=120, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["knn.json", "knn.md"]

    result = json.loads((tmp_path / "out" / "knn.json").read_text())
    assert result["protocol"] == "colors-knn/5/32px"
    assert (result["dataset"], result["split"], result["images"]) == ("colors", "validation", 9)
    assert result["settings"]["k"] == [5, 3, 1]
    details = result["details"]
    assert (details["train_images"], details["classes"], details["blocks"]) == (30, 3, [2])
    assert list(details["by_k"]) == ["5", "3", "1"]
    assert result["value"] == details["top1"] == details["by_k"]["5"] == details["every_block"][1]["top1"]
    low, high = details["interval_95"]
    assert low <= result["value"] <= high

    table = (tmp_path / "out" / "knn.md").read_text()
    assert table.startswith(f"**colors-knn/5/32px** {100 * result['value']:.1f} % top-1 (95 % interval ")
    assert "colors validation, 9 images of 3 classes, by 30 training images; seed 0" in table
    assert f"| 3 | {100 * details['by_k']['3']:.1f} |" in table
    assert table.strip() in done.stdout


@pytest.mark.parametrize(("pool", "blocks"), [("cls", "last"), ("mean", "1"), ("both", "last4")])
def test_figures_are_scikit_learns(
    knn: Evaluation, color_classes: Path, tiny_run: Path, tmp_path: Path, pool: str, blocks: str
) -> None:
    """With classes by chance, so that every neighbor matters; features are kept in half precision."""
    backbone, x, y = load_backbone(tiny_run), [], []
    for split in ("train", "val"):
        with np.load(color_classes / f"{split}.npz") as file:
            images = file["images"]
        y.append(np.random.default_rng(len(images)).permutation(np.arange(len(images)) % 3))
        np.savez(tmp_path / f"{split}.npz", images=images, labels=y[-1])
        cls, mean = reference(backbone, list(images), 32, 37).values()
        chosen = {"last": [1], "1": [0], "last4": [0, 1]}[blocks]
        parts = {"cls": [cls], "mean": [mean], "both": [cls, mean]}[pool]
        x.append(np.hstack([part[block] for part in parts for block in chosen]).astype(np.float16).astype(float))
    flags = ["--data.name=arrays", f"--pool={pool}", f"--blocks={blocks}", "--k=[7,1,2,4,12,24]"]
    found = knn.measure("--data.root", tmp_path, *flags)
    expected = {}
    for k in (7, 1, 2, 4, 12, 24):
        classifier = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected[str(k)] = classifier.fit(x[0], y[0]).score(x[1], y[1])
    assert found["details"]["by_k"] == expected
    assert found["value"] == expected["7"]
    assert len(set(expected.values())) > 1


def test_a_vector_that_no_loss_has_seen_is_named(
    knn: Evaluation, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    about = json.loads((run / "backbone.json").read_text())
    for trained, pool, used, expected in (
        ("mean", "cls", "cls", True), ("cls", "mean", "mean", True), ("mean", "mean", "mean", False),
        ("mean", "auto", "mean", False), ("cls", "auto", "cls", False), (None, "auto", "cls", False),
    ):  # fmt: skip
        (run / "backbone.json").write_text(json.dumps(about | {"pool": trained}))
        line = ["--ckpt", run, "--data.name=arrays", f"--pool={pool}"]
        found = knn.measure(*line)
        said = capsys.readouterr().out
        assert (found["settings"]["pool"], "/mean" in found["protocol"]) == (used, used == "mean")
        assert (f"warning: {run}: the head read the" in said) == expected
        assert (f"--pool {trained} measures" in said) == expected
        assert (f"Careful: the head read the {'CLS' if trained == 'cls' else 'mean'}" in said) == expected
        assert knn.measure(*line, "--untrained")["settings"]["pool"] == used
        capsys.readouterr()


def test_figures_are_of_the_labels_not_of_chance(knn: Evaluation, color_classes: Path, tmp_path: Path) -> None:
    """With the classes of the training images renamed in a circle, every hit is a miss."""
    arrays = "--data.name=arrays"
    assert knn.measure(arrays)["value"] > 0.7
    for split, shift in (("train", 1), ("val", 0)):
        with np.load(color_classes / f"{split}.npz") as file:
            np.savez(tmp_path / f"{split}.npz", images=file["images"], labels=(file["labels"] + shift) % 3)
    assert knn.measure(arrays, "--data.root", tmp_path)["value"] < 0.2


def test_images_that_find_themselves_are_warned_of(knn: Evaluation, capsys: pytest.CaptureFixture[str]) -> None:
    knn.run()
    assert "warning" not in capsys.readouterr().out
    knn.run("--data.split=train", "--k=[1]")
    out = capsys.readouterr().out
    assert "warning: train is both learned from and classified" in out
    assert "100.0 % top-1" in out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "imagenette-knn/20"),
        (["--k=[10,20]"], "imagenette-knn/10"),
        (["--pool=mean", "--blocks=last4"], "imagenette-knn/20/mean/blocks-3-4-5-6"),
        (["--blocks=2", "--size=112", "--temperature=0.1"], "imagenette-knn/20/blocks-2/112px/temperature-0.1"),
        (["--every-block", "--batch-size=3", "--seed=4", "--data.split=test"], "imagenette-knn/20"),
    ],
)
def test_every_departure_from_the_protocol_is_named(flags: list[str], expected: str) -> None:
    chosen = cli.parse(Settings, ["--ckpt=x", "--data.root=x", "--pool=cls", *flags])
    backbone = Backbone(VisionTransformer(24, 6, 2), "x", "skipless", "")
    assert protocol_id(chosen, "imagenette", choose_blocks(chosen.blocks, chosen.every_block, backbone)[-1]) == expected


def test_defaults_are_the_published_ones() -> None:
    """DINO's: 20 neighbors, temperature 0.07, CLS of the last block (unless a run says that it trained the mean of the
    patches), 224 pixels."""
    chosen = cli.parse(Settings, ["--ckpt=x", "--data.root=x"])
    assert (chosen.k[0], sorted(chosen.k)) == (20, [10, 20, 100, 200])
    assert (chosen.temperature, chosen.pool, chosen.blocks, chosen.size) == (0.07, "auto", "last", 224)


def test_splits_of_different_classes_are_refused(knn: Evaluation, tmp_path: Path) -> None:
    for split, classes in (("train", "abc"), ("val", "abd")):
        np.savez(tmp_path / f"{split}.npz", images=color_pictures(3, 0), labels=[0, 1, 2], classes=list(classes))
    last = knn.refused("--data.root", tmp_path, "--data.name=arrays", "--k=[1]")
    assert "train and val must have the same classes, and c, d is not in both" in last


def test_unreadable_image_is_named(knn: Evaluation, tmp_path: Path) -> None:
    for split in ("train", "val"):
        for name in ("a/1.png", "b/1.png"):
            (tmp_path / split / name).parent.mkdir(parents=True)
            Image.fromarray(color_pictures(1, 0)[0]).save(tmp_path / split / name)
    (tmp_path / "val/b/1.png").write_bytes(b"no image")
    last = knn.refused("--data.root", tmp_path, "--k=[1]", "--out", tmp_path / "out")
    assert "val/b/1.png: the content is not that of" in last
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not DATA, reason="SKIPLESS_TEST_DATA is not set")
def test_photographs_of_a_class_are_found_by_a_trained_network(knn: Evaluation, tmp_path: Path) -> None:
    """Three classes of imagenette, ten images each to learn from and five to classify: chance is a third."""
    source = Path(DATA or "", "imagenette128")
    for split, count in (("train", 10), ("val", 5)):
        for folder in sorted((source / split).iterdir())[:3]:
            (tmp_path / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                (tmp_path / split / folder.name / path.name).symlink_to(path.resolve())
    ckpt = Path(DATA or "", "weights/vit_small_patch14_saliency.safetensors")
    found = knn.measure("--ckpt", ckpt, "--data.root", tmp_path, "--cache", tmp_path / "cache", "--size=112")
    assert found["images"] == 15
    assert found["value"] > 0.5


def test_a_size_below_a_patch_is_refused_and_one_between_is_named_as_measured(knn: Evaluation) -> None:
    assert "size is 5, less than one patch of" in knn.refused("--size=5")
    assert "13px" not in (protocol := knn.measure("--size=13")["protocol"])
    assert protocol.endswith("8px")
