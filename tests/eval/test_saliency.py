"""Unsupervised saliency: its measures by scikit-learn, and the command on a miniature of ECSSD."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Evaluation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from sklearn.metrics import accuracy_score, fbeta_score, jaccard_score

from skipless.eval import saliency
from skipless.eval.backbones import load_backbone
from skipless.eval.objects.bilateral import bilateral_solver
from skipless.eval.objects.localization import tokencut
from skipless.eval.saliency import compare, f_curve

PATCH = 8  # of tiny_ckpt
SIZES = [(44, 59), (37, 50), (64, 33)]  # width, height; none a multiple of the patch in both
MASK = arrays.arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6)))


@given(st.data())
def test_measures_are_those_of_scikit_learn(data: st.DataObject) -> None:
    found = data.draw(MASK)
    truth = data.draw(arrays.arrays(bool, found.shape))
    f, iou, accuracy = compare(found, truth)
    pair = truth.ravel(), found.ravel()
    assert accuracy == pytest.approx(accuracy_score(*pair))
    assert iou == pytest.approx(jaccard_score(*pair, zero_division=1.0))
    if truth.any() and found.any():
        assert f == pytest.approx(fbeta_score(*pair, beta=0.3**0.5, zero_division=0.0))


def test_empty_masks() -> None:
    """Nothing found has precision 1 and recall 0; nothing to be found recall 1, and precision 0 where some is found."""
    none, some = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert compare(none, some) == (0, 0, 0)
    assert compare(some, none) == (0, 0, 0)
    assert compare(none, none) == (1, 1, 1)


@settings(deadline=None, max_examples=30)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))), st.integers(0, 99))
def test_the_bilateral_solver_cell_by_cell(image: np.ndarray, seed: int) -> None:
    """The system of the paper's equations 7 and 8, over cells of 16 pixels, 16 levels of luma and 8 of chroma."""
    image = image // 64 * 8  # few cells
    mask = np.random.default_rng(seed).random(image.shape[:2]) < 0.4
    cells: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for i, j in np.ndindex(mask.shape):
        r, g, b = map(float, image[i, j])
        y = 0.299 * r + 0.587 * g + 0.114 * b
        u = 128 - 0.168736 * r - 0.331264 * g + 0.5 * b
        v = 128 + 0.5 * r - 0.418688 * g - 0.081312 * b
        cells.setdefault((j // 16, i // 16, int(y / 16), int(u / 8), int(v / 8)), []).append((i, j))
    apart = np.abs(np.array(list(cells))[:, None] - np.array(list(cells))).sum(-1)
    blur = 10.0 * (apart == 0) + (apart == 1)
    count = np.array([len(pixels) for pixels in cells.values()], float)
    n = np.ones(len(cells))
    for _ in range(10):
        n = np.sqrt(n * count / (blur @ n))
    laplacian = np.diag(n * (blur @ n)) - n[:, None] * blur * n
    wanted = [sum(bool(mask[pixel]) for pixel in pixels) for pixels in cells.values()]
    shades = np.linalg.solve(256 * laplacian + 0.999 * np.diag(count), 0.999 * np.array(wanted, float))
    expected = np.empty(mask.shape)
    for shade, pixels in zip(shades, cells.values(), strict=True):
        for pixel in pixels:
            expected[pixel] = shade
    np.testing.assert_allclose(bilateral_solver(image, mask), expected, atol=2e-3)


def test_masks_of_patches_come_nearer_to_borders(ecssd: Path) -> None:
    """Of a disc that was cut into patches of 8 pixels."""
    image = np.array(Image.open(ecssd / "images/0000.jpg"))
    truth = np.array(Image.open(ecssd / "ground_truth_mask/0000.png")) > 127
    coarse = np.kron(truth[4::8, 4::8], np.ones((8, 8), bool))[: truth.shape[0], : truth.shape[1]]
    coarse = np.pad(coarse, [(0, side - own) for side, own in zip(truth.shape, coarse.shape, strict=True)])
    refined = bilateral_solver(image, coarse) > 0.5
    assert compare(refined, truth)[1] > compare(coarse, truth)[1] + 0.02


@given(st.data())
def test_f_at_every_threshold_is_that_of_the_mask_above_it(data: st.DataObject) -> None:
    truth = data.draw(MASK)
    shades = data.draw(arrays.arrays(float, truth.shape, elements=st.floats(-0.1, 1.1)))
    curve = f_curve(shades, truth)
    for step in (0, 1, 128, 254):
        assert curve[step] == pytest.approx(compare(shades > step / 255, truth)[0])


@pytest.fixture
def ecssd(tmp_path: Path) -> Path:
    """Three discs with soft borders, as the authors' archives unpack."""
    root = tmp_path / "ECSSD"
    for name in ("images", "ground_truth_mask"):
        (root / name).mkdir(parents=True)
    for seed, (width, height) in enumerate(SIZES):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width]
        distance = ((x - 0.6 * width) / (0.3 * width)) ** 2 + ((y - 0.4 * height) / (0.35 * height)) ** 2
        base = np.where((distance < 1)[..., None], (230, 60, 40), (40, 90, 160))
        pixels = (base + rng.integers(-40, 25, (height, width, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / f"images/{seed:04}.jpg", quality=95)
        shade = (255 * (1.5 - distance).clip(0, 0.5) / 0.5).astype(np.uint8)
        Image.fromarray(shade).save(root / f"ground_truth_mask/{seed:04}.png")
    return root


@pytest.fixture
def command(ecssd: Path, tiny_ckpt: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_ckpt}", "--data.name=ecssd", f"--data.root={ecssd}", "--device=cpu"]
    return Evaluation(saliency, words, request)


def expected(ecssd: Path, ckpt: Path) -> list[float]:
    """Mean F, IoU and accuracy, image by image: Lanczos to the nearest multiple of the patch, and back by centers."""
    backbone, rows = load_backbone(str(ckpt)), []
    for seed, (width, height) in enumerate(SIZES):
        image = Image.open(ecssd / f"images/{seed:04}.jpg")
        w, h = (round(side / PATCH) for side in (width, height))
        near = np.array(image.resize((w * PATCH, h * PATCH), Image.Resampling.LANCZOS))
        keys = backbone.features(backbone.normalize(near[None]), kind="keys")[0].patches
        grid = tokencut(keys)[0].mask
        found = np.array(
            [
                [grid[int((i + 0.5) * h / height), int((j + 0.5) * w / width)] for j in range(width)]
                for i in range(height)
            ]
        )
        truth = np.array(Image.open(ecssd / f"ground_truth_mask/{seed:04}.png")) > 0
        pair = truth.ravel(), found.ravel()
        rows.append([fbeta_score(*pair, beta=0.3**0.5), jaccard_score(*pair), accuracy_score(*pair)])
    return np.mean(rows, 0).tolist()


def test_a_set_is_measured(command: Evaluation, ecssd: Path, tiny_ckpt: Path, tmp_path: Path) -> None:
    result = command.written(tmp_path / "out", "--every-block")
    assert (result["protocol"], result["metric"], result["images"]) == ("ecssd-tokencut", "maxF", 3)
    assert "SUBSET, 3 of 1,000" in result["details"]["data"]
    measured = [result["details"][name]["value"] for name in ("maxF", "IoU", "accuracy")]
    np.testing.assert_allclose(measured, expected(ecssd, tiny_ckpt), atol=0.02)
    assert result["value"] == measured[0]
    assert result["details"]["every_block"][-1]["maxF"] == measured[0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "saliency.json", "saliency.md", "saliency.png",
    ]  # fmt: skip
    few = command.measure("--limit=2")
    assert (few["images"], "SUBSET, 2 of 1,000" in few["details"]["data"]) == (2, True)
    assert f"{100 * measured[1]:.1f}" in (tmp_path / "out" / "saliency.md").read_text()


def test_masks_are_refined(command: Evaluation, ecssd: Path, tmp_path: Path) -> None:
    plain = command.measure("--untrained=true")
    result = command.written(tmp_path, "--untrained=true", "--bilateral-solver=true")
    assert result["protocol"] == "ecssd-tokencut/bilateral-solver"
    assert result["details"]["without_solver"]["IoU"] == plain["details"]["IoU"]["value"]
    assert result["details"]["IoU"]["value"] != plain["details"]["IoU"]["value"]
    assert "With a bilateral solver." in (tmp_path / "saliency.md").read_text()
    assert "leave out every-block" in command.refused("--bilateral-solver=true", "--every-block")


def test_an_interrupted_run_goes_on(command: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command.written(tmp_path / "whole", "--batch-size=1")
    with monkeypatch.context() as patch:
        patch.setattr(saliency, "measure", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.measure("--out", tmp_path / "out", "--batch-size=1")
    (log,) = (tmp_path / "out").glob("found-*.jsonl")
    assert len(log.read_text().splitlines()) == 4
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__call__", lambda *_: 1 / 0)  # nothing is computed again
        again = command.measure("--out", tmp_path / "out", "--batch-size=1")
    assert json.dumps(again["details"]) == json.dumps(whole["details"])


def test_what_cannot_be_measured_is_refused(command: Evaluation, ecssd: Path) -> None:
    assert "tau has no effect on lost" in command.refused("--method=lost", "--tau=0.3")
    mask = ecssd / "ground_truth_mask/0001.png"
    Image.new("L", (9, 9), 255).save(mask)
    assert "the mask has 9 x 9 pixels and its image" in command.refused()
    mask.unlink()
    assert "0001.png" in command.refused()
    (ecssd / "ground_truth_mask").rename(ecssd / "other")
    assert "no folder of masks there; one of ground_truth_mask, gt" in command.refused()
