"""k-NN votes, token statistics, PCA colors and summaries, against hand-computed and independent values."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from skipless.common.pca import pca_colors
from skipless.common.pixels import normalize
from skipless.datasets.images import open_images
from skipless.eval.summarize import summarize, table
from skipless.ssl import monitor
from skipless.ssl.model.statistics import effective_rank, mean_share, token_statistics
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.monitor import MonitorSettings, describe_blocks, knn_accuracy, labeled_sets, measure_blocks


def test_knn_votes_are_weighted_as_in_dino() -> None:
    """exp(similarity / 0.07), cosine, top k, counted by a loop."""
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(60, 5)), rng.normal(size=(30, 5))
    bank_labels, query_labels = rng.integers(0, 4, 60), rng.integers(0, 4, 30)
    right = 0
    for query, label in zip(queries, query_labels, strict=True):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        nearest = np.argsort(-similarity)[:7]
        votes = np.zeros(4)
        for i in nearest:
            votes[bank_labels[i]] += np.exp(similarity[i] / 0.07)
        right += votes.argmax() == label
    assert knn_accuracy(bank, bank_labels, queries, query_labels, k=7) == pytest.approx(right / 30)


def test_knn_with_fewer_neighbors_than_k() -> None:
    bank = np.array([[1.0, 0], [0, 1.0]])
    assert knn_accuracy(bank, np.array([0, 1]), np.array([[2.0, 0.1], [0.1, 5]]), np.array([0, 1]), k=20) == 1.0


def test_mean_share_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 0], [1, 0]], [[1, 0], [-1, 0]], [[2, 0], [0, 0]]])
    torch.testing.assert_close(mean_share(tokens), torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64))


def test_effective_rank_by_hand() -> None:
    """Centered tokens spread evenly over r directions have effective rank r."""
    for r in (1, 2, 5):
        axes = torch.eye(8)[:r]
        tokens = torch.cat([axes, -axes])[None] + 3.0
        assert effective_rank(tokens).item() == pytest.approx(r, rel=1e-9)
    # Energies 3 : 1, by hand: exp(-(0.75 ln 0.75 + 0.25 ln 0.25))
    tokens = torch.tensor([[[3.0**0.5, 0], [-(3.0**0.5), 0], [0, 1], [0, -1]]], dtype=torch.float64)
    assert effective_rank(tokens).item() == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


def test_default_initialization_without_skips_makes_all_tokens_equal() -> None:
    """The reason for the whole method: mean share near 1 after a few blocks, and far from it with skips."""
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    shares = {}
    for residual in (True, False):
        torch.manual_seed(0)
        model = VisionTransformer(64, 4, 2, patch=8, residual=residual, image_size=64)
        shares[residual] = token_statistics(model, images)["mean_share"][-1]
    assert shares[False] > 0.99
    assert shares[True] < 0.6


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 6)):
        for i in range(count):
            folder = tmp_path / split / ("red" if i % 2 else "green")
            folder.mkdir(parents=True, exist_ok=True)
            picture = rng.integers(0, 60, (20, 20, 3), dtype=np.uint8)
            picture[..., 0 if i % 2 else 1] += 180
            Image.fromarray(picture).save(folder / f"{i:02}.png")
    return tmp_path


def test_val_beside_train_is_classified(classes: Path) -> None:
    found = labeled_sets(open_images(classes / "train"), MonitorSettings(), default_size=16)
    assert found is not None
    bank, queries, said = found
    assert (len(bank), len(queries)) == (20, 6)
    assert str(classes / "val") in said
    backbone = VisionTransformer(16, 2, 2, patch=8, image_size=16).eval()
    # A linear look at the mean color is enough to tell red from green, trained or not.
    measured = measure_blocks(backbone, bank, queries, k=3, pool="mean")
    assert [block["knn"] for block in measured] == [1.0, 1.0]


def test_statistics_are_of_some_queries_evenly_spread(classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "STATISTICS", 3)
    (classes / "val/green/00.png").write_bytes(b"")  # its statistics are left out, and no other's are taken
    found = labeled_sets(open_images(classes / "train"), MonitorSettings(), default_size=16)
    assert found is not None
    backbone = VisionTransformer(16, 2, 2, patch=8, image_size=16).eval()
    measured = measure_blocks(backbone, *found[:2], k=3, pool="mean")
    views = torch.stack([found[1][i][0] for i in (2, 5)])  # type: ignore[index]
    expected = token_statistics(backbone, normalize(views[None]))
    for name in ("mean_share", "effective_rank"):
        assert [block[name] for block in measured] == pytest.approx(expected[name], rel=1e-4)


def test_without_val_every_tenth_image_is_classified(classes: Path) -> None:
    (classes / "train").rename(classes / "photos")
    found = labeled_sets(open_images(classes / "photos"), MonitorSettings(), default_size=16)
    assert found is not None
    bank, queries, _ = found
    assert (len(bank), len(queries)) == (18, 2)
    assert not set(bank.indices) & set(queries.indices)


def test_images_without_classes_are_not_monitored(classes: Path) -> None:
    images = open_images(classes / "val" / "red")
    assert labeled_sets(images, MonitorSettings(), default_size=16) is None
    with pytest.raises(ValueError, match="no class folders"):
        labeled_sets(images, MonitorSettings(path=str(classes / "val")), default_size=16)


def test_other_classes_are_an_error(classes: Path) -> None:
    (classes / "val" / "red").rename(classes / "val" / "blue")
    with pytest.raises(ValueError, match="does not have the class folders"):
        labeled_sets(open_images(classes / "train"), MonitorSettings(path=str(classes / "val")), default_size=16)


def test_pca_colors_are_scikit_learns_components_with_fixed_signs() -> None:
    rng = np.random.default_rng(0)
    features = rng.exponential(size=(2, 4, 5, 6)) * [5, 3, 2, 1, 1, 1]
    colors = pca_colors(features, percentile=0)
    components = PCA(3).fit_transform(features.reshape(-1, 6))
    for channel in range(3):
        correlation = np.corrcoef(colors[..., channel].ravel(), components[:, channel])[0, 1]
        assert abs(correlation) == pytest.approx(1, abs=1e-6)
    assert colors.min() == 0
    assert colors.max() == 1
    np.testing.assert_allclose(pca_colors(features[::-1], percentile=0)[::-1], colors, atol=1e-8)
    turned = features @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    np.testing.assert_allclose(pca_colors(turned, percentile=0), colors, atol=1e-6)
    with pytest.raises(ValueError, match="must be finite"):
        pca_colors(np.full((1, 2, 2, 3), np.nan))


def test_summary_tells_first_and_last_measurement(tmp_path: Path) -> None:
    run = tmp_path / "arm"
    run.mkdir()
    about = {
        "pool": "mean",
        "step": 4,
        "seconds": 120.0,
        "processes": 2,
        "hardware": "x",
        "versions": {},
        "commit": "c",
    }
    about["architecture"] = {"dim": 8}
    about["settings"] = {"monitor": {"k": 20}, "data": {"path": "/d/imagenette/train"}, "seed": 0}
    (run / "backbone.json").write_text(json.dumps(about))
    measured = [
        {
            "step": s,
            "epoch": e,
            "monitor/knn": [k, k / 2],
            "monitor/mean_share": [0, 0.5],
            "monitor/effective_rank": [3, 2],
        }
        for s, e, k in ((0, 0, 0.2), (2, 1, 0.3), (4, 2, 0.5))
    ]
    lines = [measured[0], {"step": 1, "epoch": 0.5, "loss": 3.0}, measured[1], {"step": 4, "loss": 2.0}, measured[2]]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (result,), left_out = summarize([tmp_path, run])
    assert left_out == [f"{tmp_path} is no finished pretraining run: it has no backbone.json"]
    assert result["value"] == 0.25
    assert result["details"]["untrained"]["knn"] == [0.2, 0.1]
    assert result["details"]["final_loss"] == 2.0
    assert result["dataset"] == "imagenette"
    assert "| arm | 10.0 | 25.0 (+15.0) | 50.0 (block 1) | 2.000 | 2.0 |" in table([result])
    without = [{name: value for name, value in line.items() if name != "monitor/knn"} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in without))
    (unlabeled,), _ = summarize([run])
    assert (unlabeled["metric"], unlabeled["value"], unlabeled["details"]["curve"]) == ("effective rank", 2, [])
    both = table([result, unlabeled])
    assert "| arm | - | - | - | 2.000 | 2.0 |" in both
    assert both.count("| arm | k-NN top-1, % |") == 1
    assert both.count("| arm | effective rank | 3.0 -> 3.0 | 2.0 -> 2.0 |") == 2
    with pytest.raises(ValueError, match="no finished pretraining run"):
        summarize([tmp_path])


def test_a_dead_last_block_is_warned_of() -> None:
    alive = {"knn": 0.5, "mean_share": 0.3, "effective_rank": 7.0}
    assert "WARNING" not in describe_blocks([alive, alive], 20)
    assert "WARNING: the last block's patch tokens are one and the same" in describe_blocks(
        [alive, alive | {"mean_share": 0.99}], 20
    )


def test_conditioning_needs_the_monitor() -> None:
    with pytest.raises(ValueError, match="every_epochs 0 turns the monitor off"):
        MonitorSettings(conditioning=True, every_epochs=0)
