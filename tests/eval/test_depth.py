"""Depth: head, losses and measures by hand and by brute force; the command on miniatures of NYUv2 and of one's own."""

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import Evaluation
from PIL import Image
from scipy.io import savemat

from skipless.datasets.labels.depth import depth_folder, nyuv2
from skipless.eval import depth
from skipless.eval.dense.depth import DepthHead, HeadSettings, depth_scores, gradient_loss, scale_invariant_loss

RNG = np.random.default_rng(0)


def test_measures_by_hand() -> None:
    """Factors 1.2, 1.25, 1.5 and 1: two are within 1.25, which itself is not."""
    truth, found = np.array([1.0, 4.0, 3.0, 2.0]), np.array([1.2, 5.0, 2.0, 2.0])
    delta1, absrel, rmse = depth_scores(found, truth)
    assert delta1 == 0.5
    assert absrel == pytest.approx((0.2 + 0.25 + 1 / 3 + 0) / 4)
    assert rmse == pytest.approx(((0.04 + 1 + 1 + 0) / 4) ** 0.5)


def test_losses_pixel_by_pixel() -> None:
    found, truth = RNG.uniform(0.5, 9, (2, 9, 7))
    truth[2, 3] = truth[8, 6] = np.nan
    g = np.log(found + 0.001) - np.log(truth + 0.001)
    known = np.isfinite(g)
    pair = torch.from_numpy(found)[known], torch.from_numpy(truth)[known]
    values = g[known]
    variance = ((values - values.mean()) ** 2).sum() / (values.size - 1)
    assert scale_invariant_loss(*pair).item() == pytest.approx((variance + 0.15 * values.mean() ** 2) ** 0.5)
    assert scale_invariant_loss(*pair, warm_up=True).item() == pytest.approx(0.15**0.5 * abs(values.mean()))
    total = 0.0
    for stride in (1, 2, 4, 6):
        part, changes = g[::stride, ::stride], []
        for i in range(part.shape[0]):
            for j in range(part.shape[1]):
                if i + 2 < part.shape[0]:
                    changes.append(abs(part[i + 2, j] - part[i, j]))
                if j + 2 < part.shape[1]:
                    changes.append(abs(part[i, j + 2] - part[i, j]))
        total += np.nansum(changes) / np.isfinite(part).sum()
    assert gradient_loss(torch.from_numpy(found), torch.from_numpy(truth)).item() == pytest.approx(total)


def test_the_head_mixes_depths_by_their_shares() -> None:
    """As written: CLS beside every patch, features resized, a convolution of 1 x 1, and the mean of the bins."""
    chosen = HeadSettings(bins=5, min_depth=1, max_depth=9, upsample=3)
    head = DepthHead(4, chosen)
    patches, cls = torch.randn(2, 3, 2, 4), torch.randn(2, 4)
    x = torch.cat([patches, cls[:, None, None].expand(-1, 3, 2, -1)], -1).permute(0, 3, 1, 2)
    x = F.interpolate(x, scale_factor=3, mode="bilinear")
    shares = F.conv2d(x, head.linear.weight[:, :, None, None], head.linear.bias).relu() + 0.1
    expected = (shares * torch.tensor([1.0, 3, 5, 7, 9])[:, None, None]).sum(1) / shares.sum(1)
    torch.testing.assert_close(head(patches, cls), expected)


HEIGHT, WIDTH = 480, 640


@pytest.fixture(scope="module")
def stored() -> dict[str, np.ndarray]:
    """Five images as MATLAB has them, columns first: bright is near, and some of the depth is not known."""
    near = np.repeat(np.repeat(RNG.random((5, 1, 20, 15)), 32, 2), 32, 3)  # [N, 1, W, H]
    depths = (1 + 6 * (1 - near[:, 0])).astype(np.float32)
    depths[:, 100:140, 200:300] = 0
    return {"images": np.repeat((255 * near).astype(np.uint8), 3, 1), "rawDepths": depths}


@pytest.fixture
def nyu(stored: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Written by h5py; where that is missing, what it reads comes from an archive of arrays in its place."""
    root = tmp_path / "NYUv2"
    root.mkdir()
    path = root / "nyu_depth_v2_labeled.mat"
    try:
        import h5py

        with h5py.File(path, "w") as file:
            for name, array in stored.items():
                file[name] = array
    except ImportError:
        np.savez(root / "arrays.npz", **stored)
        (root / "arrays.npz").rename(path)
        monkeypatch.setitem(sys.modules, "h5py", SimpleNamespace(File=lambda path, _: np.load(path)))
    savemat(root / "splits.mat", {"trainNdxs": [[4], [1], [2]], "testNdxs": [[3], [5]]})
    return root


@pytest.fixture
def command(nyu: Path, tiny_ckpt: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_ckpt}", f"--data.root={nyu}", "--size=64", "--device=cpu", f"--cache={tmp_path / 'cache'}"]
    return Evaluation(depth, [*words, "--head.upsample=1", "--head.epochs=1"], request)


def test_images_and_depths_are_those_of_matlab(nyu: Path, stored: dict[str, np.ndarray]) -> None:
    """Numbers of the split count from 1; the frame is black."""
    image, meters = nyuv2(nyu, "test").read(1)
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert image[50, 90].tolist() == stored["images"][4, :, 90, 50].tolist()
    assert not image[:7].any()
    assert not image[474:].any()
    assert not image[:, :7].any()
    assert not image[:, 632:].any()
    np.testing.assert_array_equal(np.isnan(meters), stored["rawDepths"][4].T == 0)
    assert meters[50, 90] == stored["rawDepths"][4, 90, 50]
    assert nyuv2(nyu, "train").names == ("0004", "0001", "0002")


def test_nyuv2_is_measured(command: Evaluation, nyu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's maps against the depths that are known, within Eigen's crop."""
    kept: list[Any] = []
    scored = depth.score
    monkeypatch.setattr(depth, "score", lambda *given: kept.append(scored(*given)) or kept[-1])
    result = command.written(tmp_path / "out")
    assert (result["protocol"], result["metric"]) == ("nyuv2-depth/quick/64px (changed)", "delta1")
    assert result["details"]["data"] == "nyuv2 test SUBSET, 2 of 654 images"
    assert result["details"]["image_size"] == [64, 80]
    rows = []
    for row in range(2):
        _, truth = nyuv2(nyu, "test").read(row)
        inside = np.zeros((HEIGHT, WIDTH), bool)
        inside[45:471, 41:601] = True
        known = inside & ~np.isnan(truth)
        rows.append(depth_scores(kept[0][1][row][known], truth[known]))
    measured = [result["details"][name] for name in ("delta1", "AbsRel", "RMSE")]
    np.testing.assert_allclose(measured, np.mean(rows, 0), rtol=1e-4)
    assert f"RMSE {result['details']['RMSE']:.3f} m" in (tmp_path / "out/depth.md").read_text()
    assert (tmp_path / "out/depth.png").stat().st_size > 1000
    blocks = command.measure("--every-block", "--limit=1")
    assert [row["block"] for row in blocks["details"]["every_block"]] == [1, 2]
    assert blocks["images"] == 1
    assert command.measure("--blocks=last4", "--limit=1")["protocol"].endswith("/blocks-1-2 (changed)")


def test_what_cannot_be_read_of_nyuv2_is_refused(
    command: Evaluation, nyu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "NYUv2 has no split val; choose train or test" in command.refused("--data.split=val")
    assert "give 0 < min < max" in command.refused("--head.max_depth=0")
    savemat(nyu / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[6]]})
    assert "do not belong together" in command.refused()
    (nyu / "splits.mat").write_bytes(b"no file of MATLAB")
    assert "splits.mat: cannot be read as NYUv2's splits" in command.refused()
    monkeypatch.setitem(sys.modules, "h5py", None)
    savemat(nyu / "splits.mat", {"trainNdxs": [[1]], "testNdxs": [[2]]})
    assert "pip install h5py" in command.refused()
    (nyu / "splits.mat").unlink()
    assert "splits.mat: no such file" in command.refused()


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Eight images, of which two are of val: depths in millimeters, and in meters."""
    root = tmp_path / "rooms"
    for name in ("images", "depth"):
        (root / name).mkdir(parents=True)
    for number in range(8):
        near = np.kron(RNG.random((4, 5)), np.ones((8, 8)))
        near[:8, :8] = 0
        Image.fromarray(np.repeat((255 * near[..., None]).astype(np.uint8), 3, 2)).save(root / f"images/{number}.jpg")
        meters = 1 + 6 * (1 - near)
        if number % 2:
            Image.fromarray((1000 * meters).astype(np.uint16)).save(root / f"depth/{number}.png")
        else:
            np.save(root / f"depth/{number}.npy", meters)
    return root


def test_depths_of_ones_own(command: Evaluation, own: Path, tmp_path: Path) -> None:
    words = ["--data.name=depth", f"--data.root={own}", "--size=32"]
    split = depth_folder(own, "val")
    assert [Path(name).name for name in split.names] == ["3.jpg", "7.jpg"]
    assert split.read_depth(0).max() == pytest.approx(7, abs=0.001)
    assert depth_folder(own, "train").read_depth(0).max() == 7
    result = command.measure(*words, "--head.epochs=150", "--head.lr=0.01")
    assert (result["protocol"], result["images"]) == ("rooms-depth/quick/32px (changed)", 2)
    depths = np.concatenate([split.read_depth(row).ravel() for row in (0, 1)])
    assert result["details"]["RMSE"] < 0.8 * depths.std()  # of the best single depth
    Image.fromarray(np.full((32, 40), 65_000, np.uint16)).save(own / "depth/7.png")  # beyond 10 m
    assert command.measure(*words)["details"]["images_without_depth"] == 1
    for place in ("train", "val"):
        shutil.copytree(own, tmp_path / "split" / place)
    assert len(depth_folder(tmp_path / "split", "val")) == 8


def test_damaged_depths_are_refused(command: Evaluation, own: Path) -> None:
    words = ["--data.name=depth", f"--data.root={own}", "--size=32"]
    for number in (3, 7):
        Image.fromarray(np.zeros((32, 40), np.uint16)).save(own / f"depth/{number}.png")
    assert "no pixel of 2 images has a depth between 0.001 and 10 m to compare with" in command.refused(*words)
    kept = [(own / f"depth/{number}.npy", np.load(own / f"depth/{number}.npy")) for number in (0, 2, 4, 6)]
    for path, array in kept:
        np.save(path, np.full_like(array, np.nan))
    for number in (1, 5):
        Image.fromarray(np.zeros((32, 40), np.uint16)).save(own / f"depth/{number}.png")
    assert "no pixel of 6 images has a depth between 0.001 and 10 m to learn from" in command.refused(*words)
    np.save(kept[0][0], np.ones((3, 4)))
    assert "the image has 40 x 32 pixels and its depth 4 x 3" in command.refused(*words)
    np.save(kept[0][0], np.ones((3, 4, 3)))
    assert "holds float64 [3, 4, 3]; depth must be numbers [H, W]" in command.refused(*words)
    kept[0][0].unlink()
    assert "0.png: no such depth, nor one that ends in .npy" in command.refused(*words)
    Image.new("L", (40, 32)).save(own / "depth/0.png")
    assert "its pixels are L; depth must be 16-bit gray" in command.refused(*words)
    assert "has no split test; without folders" in command.refused(*words, "--data.split=test")
    shutil.rmtree(own / "images")
    assert "no images there" in command.refused(*words)
