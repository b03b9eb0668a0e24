"""Points found again: by brute force, on a miniature of SPair-71k, and in the picture of two images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Evaluation, call, refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from skipless.eval import correspondence
from skipless.eval.backbones import load_backbone
from skipless.eval.correspondence import score
from skipless.eval.match import main as draw_match
from skipless.eval.match import spread
from skipless.eval.matching import match_points, mutual_neighbors

SHAPE = st.tuples(st.integers(1, 5), st.integers(1, 5))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@settings(deadline=None)
@given(a=SHAPE, b=SHAPE, seed=st.integers(0, 999))
def test_the_nearest_patch_by_brute_force(a: tuple[int, int], b: tuple[int, int], seed: int) -> None:
    """From the centers of patches, where nothing is interpolated."""
    rng = np.random.default_rng(seed)
    source, target = rng.normal(size=(*a, 6)), rng.normal(size=(*b, 6))
    points, answers = [], []
    for i in range(a[0]):
        for j in range(a[1]):
            points.append([(j + 0.5) / a[1], (i + 0.5) / a[0]])
            places = [(cosine(source[i, j], target[k, m]), k, m) for k in range(b[0]) for m in range(b[1])]
            _, k, m = max(places)
            answers.append([(m + 0.5) / b[1], (k + 0.5) / b[0]])
    found = match_points(torch.from_numpy(source), torch.from_numpy(target), torch.tensor(points))
    np.testing.assert_allclose(found, answers, atol=1e-12)
    theirs, mine, alike = mutual_neighbors(torch.from_numpy(source), torch.from_numpy(target))
    assert (np.diff(alike) <= 1e-12).all()
    for (i, j), (k, m), value in zip(theirs, mine, alike, strict=True):
        assert value == pytest.approx(cosine(source[i, j], target[k, m]))
        assert value == pytest.approx(max(cosine(source[i, j], x) for x in target.reshape(-1, 6)))
        assert value == pytest.approx(max(cosine(x, target[k, m]) for x in source.reshape(-1, 6)))


def test_a_point_between_patches_is_interpolated() -> None:
    """Half-way between two patches of directions 0 and 90 degrees lies 45."""
    source = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    target = torch.tensor([[[1.0, 0.1], [1.0, 1.0], [0.1, 1.0]]])
    found = match_points(source, target, torch.tensor([[0.5, 0.2], [0.0, 0.5], [1.0, 1.0]]))
    np.testing.assert_allclose(found, [[0.5, 0.5], [1 / 6, 0.5], [5 / 6, 0.5]])


def test_a_window_weighs_the_neighbors() -> None:
    """Cosines 0, 1, 0.5 and 0.9 in a row: the last lies outside of the window around the second."""
    angles = np.arccos([0.0, 1.0, 0.5, 0.9])
    target = torch.from_numpy(np.stack([np.cos(angles), np.sin(angles)], -1))[None]
    (found,) = match_points(torch.tensor([[[1.0, 0.0]]]), target, torch.tensor([[0.5, 0.5]]), 3, 0.5)
    weights = np.exp(np.array([0.0, 1.0, 0.5]) / 0.5)
    assert found[0].item() == pytest.approx(weights @ [0.125, 0.375, 0.625] / weights.sum())
    assert found[1].item() == pytest.approx(0.5)


def test_both_averages_by_hand() -> None:
    """Three of four points within a tenth: 75 % of the points, 83 % of the pairs' means."""
    scores = score([("cat", [0.05]), ("cat", [0.1, 0.04, 0.2]), ("dog", [0.5, 0.01])], 0)
    assert scores["pck_per_point"]["0.1"] == pytest.approx(4 / 6)
    assert scores["pck_per_image"]["0.1"] == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert scores["pck_per_point"]["0.05"] == pytest.approx(3 / 6)
    assert scores["by_category"]["cat"] == {
        "pairs": 2, "per_point": pytest.approx(3 / 4), "per_image": pytest.approx(5 / 6),
    }  # fmt: skip


ANNOTATION = {
    "category": "cat", "src_imname": "a.jpg", "trg_imname": "b.jpg", "src_imsize": [40, 30, 3],
    "trg_imsize": [36, 52, 3],
    "src_kps": [[4, 5], [30, 20], [22.5, 11]], "trg_kps": [[6, 40], [30, 12], [1, 2]], "trg_bndbox": [3, 2, 33, 50],
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two pairs of two categories, in the layout of SPair-71k."""
    for category in ("cat", "dog"):
        folder = tmp_path / "SPair-71k/JPEGImages" / category
        folder.mkdir(parents=True)
        for seed, (name, size) in enumerate({"a.jpg": (30, 40, 3), "b.jpg": (52, 36, 3)}.items()):
            pixels = np.random.default_rng(seed).integers(0, 255, size, np.uint8)
            Image.fromarray(pixels).save(folder / name)
    folder = tmp_path / "SPair-71k/PairAnnotation/test"
    folder.mkdir(parents=True)
    (folder / "000001-a-b:dog.json").write_text(json.dumps(ANNOTATION | {"category": "dog"}))
    (folder / "000002-a-b:cat.json").write_text(json.dumps(ANNOTATION))
    return tmp_path / "SPair-71k"


@pytest.fixture
def command(root: Path, tiny_ckpt: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_ckpt}", f"--data.root={root}", "--size=32", "--device=cpu"]
    return Evaluation(correspondence, words, request)


def test_pck_by_brute_force(command: Evaluation, root: Path, tiny_ckpt: Path, tmp_path: Path) -> None:
    result = command.written(tmp_path / "out")
    backbone = load_backbone(str(tiny_ckpt))
    grids = []
    for name in ("a.jpg", "b.jpg"):
        square = torch.nn.functional.interpolate(  # as resample does, by another library
            torch.from_numpy(np.array(Image.open(root / "JPEGImages/cat" / name))).permute(2, 0, 1)[None].double(),
            (32, 32), mode="bicubic", antialias=True,
        )  # fmt: skip
        pixels = square.round().clamp(0, 255).byte()[0].permute(1, 2, 0).numpy()
        grids.append(backbone.features(backbone.normalize(pixels[None]))[0].patches[0])
    shares = torch.tensor(ANNOTATION["src_kps"], dtype=torch.double) / torch.tensor([40, 30])
    answers = match_points(*grids, shares).numpy() * (36, 52)
    distances = np.linalg.norm(answers - np.array(ANNOTATION["trg_kps"]), axis=1) / 48
    for alpha in ("0.05", "0.1", "0.15"):
        assert result["details"]["pck_per_point"][alpha] == pytest.approx((distances <= float(alpha)).mean())
    assert (result["protocol"], result["images"], result["details"]["points"]) == ("spair-nearest/32px", 2, 6)
    assert "SUBSET, 2 of 12,234 pairs" in result["details"]["data"]
    assert "| dog | 1 |" in (tmp_path / "out/correspondence.md").read_text()
    one = command.measure("--limit=1", "--window=3", "--blocks=last4")
    assert (one["images"], one["protocol"].split("/")[0]) == (1, "spair-window-3")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"src_kps": [[4, 5], [41, 20], [22, 11]]},
            "src_kps has the point 41, 20 outside of the image, which has 40 x 30",
        ),
        ({"src_kps": [[4, 5]]}, "1 and 3 points; as many of both are needed"),
        ({"src_kps": [[4, float("nan")], [1, 1], [2, 2]]}, "outside of the image"),
        ({"trg_bndbox": [9, 9, 3, 3]}, "trg_bndbox is [9, 9, 3, 3]"),
        ({"trg_imname": "c.jpg"}, "c.jpg"),
    ],
)
def test_damaged_pairs_are_refused(command: Evaluation, root: Path, change: dict[str, Any], sentence: str) -> None:
    (root / "PairAnnotation/test/000002-a-b:cat.json").write_text(json.dumps(ANNOTATION | change))
    assert sentence in command.refused()


def test_other_words_are_refused(command: Evaluation) -> None:
    assert "splits that are there: test" in command.refused("--data.split=val")
    assert "window is 4; give an odd number" in command.refused("--window=4")


def test_pairs_are_spread() -> None:
    """(0, 0) and (0, 1) are neighbors, so the second pair is left out; three are asked for, two are left."""
    first, second = np.array([[0, 0], [0, 1], [2, 0]]), np.array([[5, 5], [6, 6], [7, 7]])
    kept = spread(first, second, 3)
    assert kept[0].tolist() == [[0, 0], [2, 0]]
    assert kept[1].tolist() == [[5, 5], [7, 7]]


def test_a_picture_of_two_images(
    root: Path, tiny_ckpt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [root / "JPEGImages/cat/a.jpg", root / "JPEGImages/cat/b.jpg"]
    usual = ["--ckpt", tiny_ckpt, "--size=32", "--device=cpu"]
    for out, more in (("match.png", []), ("points.svg", ["--points", "3,4", "20,20"])):
        done = call(draw_match, [*pictures, *usual, "--out", tmp_path / out, *more])
        assert done.returncode == 0, done.stderr
        assert (tmp_path / out).stat().st_size > 1000
    assert "lies outside of the image" in refusal(draw_match, [*pictures, *usual, "--points", "90,4"], capsys)
    assert "nowhere.jpg: no such image file" in refusal(draw_match, [pictures[0], "nowhere.jpg", *usual], capsys)
