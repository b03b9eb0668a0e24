"""Video object segmentation: J and F by hand and by brute force, labels carried on patch by patch, and the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, Evaluation
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from skipless.common import cli
from skipless.common.settings import flat, plain
from skipless.datasets.synthetic.moving import write_moving_scenes
from skipless.eval import depth, video
from skipless.eval.metrics import boundary_accuracy, region_similarity, video_scores
from skipless.eval.propagation import PropagationSettings, follow, pixel_mask, propagate

SIZE = st.tuples(st.integers(1, 9), st.integers(1, 9))


def edges(mask: np.ndarray) -> list[tuple[int, int]]:
    """Pixels that differ from one of three neighbors, where those are in the image."""
    h, w = mask.shape
    return [
        (i, j)
        for i in range(h)
        for j in range(w)
        if any(
            mask[i, j] != mask[k, m] for k, m in ((i, j + 1), (i + 1, j), (i + 1, j + 1)) if k < h and m < w
        )
    ]  # fmt: skip


@given(st.data(), st.sampled_from([0.008, 0.2]))
def test_j_and_f_pixel_by_pixel(data: st.DataObject, tolerance: float) -> None:
    a = data.draw(arrays.arrays(bool, SIZE))
    b = data.draw(arrays.arrays(bool, a.shape))
    pixels = [set(zip(*np.nonzero(mask), strict=True)) for mask in (a, b)]
    union = len(pixels[0] | pixels[1])
    assert region_similarity(a, b) == pytest.approx(len(pixels[0] & pixels[1]) / union if union else 1)
    radius = int(np.ceil(tolerance * (a.shape[0] ** 2 + a.shape[1] ** 2) ** 0.5))
    found, truth = edges(a), edges(b)
    if not found or not truth:
        assert boundary_accuracy(a, b, tolerance) == (not found and not truth)
        return
    shares = [
        sum(any((i - k) ** 2 + (j - m) ** 2 <= radius**2 for k, m in there) for i, j in own) / len(own)
        for own, there in ((found, truth), (truth, found))
    ]
    f = 2 * shares[0] * shares[1] / sum(shares) if any(shares) else 0
    assert boundary_accuracy(a, b, tolerance) == pytest.approx(f)


def test_j_and_f_by_hand() -> None:
    """A square of 4 x 4 and one three columns to the right, in 12 x 12 pixels, where a boundary is right within one.

    Each boundary is a ring of 16 pixels (5 x 5 without its middle): columns 1 to 5, and 4 to 8. Of the first, the two
    sides that run along the columns 3, 4 and 5 lie within a pixel of the other's: 6 pixels; and its right side, in
    column 5, is a pixel from the other's left one, in column 4: 3 more. The other way round it is the same.
    """
    a, b = np.zeros((2, 12, 12), bool)
    a[2:6, 2:6], b[2:6, 5:9] = True, True
    assert region_similarity(a, b) == 4 / 28
    assert boundary_accuracy(a, b) == 9 / 16


def test_scores_of_a_video_by_hand() -> None:
    """Nine frames: quarters are frames 1 to 3, 3 to 5, 5 to 7 and 7 to 9."""
    values = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert video_scores(values) == pytest.approx((0.5, 4 / 9, 0.8 - 0.2))
    assert video_scores(np.array([0.4])) == pytest.approx((0.4, 0, 0))


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2), st.integers(1, 4), st.booleans())
def test_labels_are_carried_on_patch_by_patch(n: int, h: int, w: int, radius: int, topk: int, few: bool) -> None:
    rng = np.random.default_rng(n * h + w)
    query, sources = rng.normal(size=(h, w, 4)), rng.normal(size=(n, h, w, 4))
    query, sources = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, sources))
    labels = rng.random((n, h, w, 3))
    with pytest.MonkeyPatch.context() as patch:
        if few:  # a row at a time
            patch.setattr("skipless.eval.propagation.CHUNK", 1)
        chosen = PropagationSettings(neighborhood=radius, topk=topk, temperature=0.3)
        found = propagate(*map(torch.from_numpy, (query, sources, labels)), chosen)
    for i in range(h):
        for j in range(w):
            near = [
                (query[i, j] @ sources[t, k, m], t, k, m)
                for t in range(n)
                for k in range(h)
                for m in range(w)
                if not radius or max(abs(i - k), abs(j - m)) <= radius
            ]
            best = sorted(near, reverse=True)[:topk]
            weights = [np.exp(cosine / 0.3) for cosine, *_ in best]
            expected = sum(x * labels[t, k, m] for x, (_, t, k, m) in zip(weights, best, strict=True)) / sum(weights)
            np.testing.assert_allclose(found[i, j], expected, atol=1e-9)


def test_labels_come_from_the_first_frame_and_the_last_ones() -> None:
    """Two patches trade their places in every frame; with the first frame alone, and with one more, both are found."""
    here, there = torch.eye(2)[None], torch.eye(2)[None].flip(1)
    for last_frames in (0, 1):
        shares = list(
            follow([here, there, here], np.array([[0, 1]], np.uint8), PropagationSettings(last_frames, topk=1))
        )
        assert [x.argmax(-1).tolist() for x in shares] == [[[1, 0]], [[0, 1]]]


def test_maps_are_stretched_class_by_class() -> None:
    """The object has a tenth of the patch that it is in at all; nothing has the third class; one class has all."""
    shares = torch.tensor([[[1.0, 0.0, 0.0], [0.9, 0.1, 0.0]]])
    assert pixel_mask(shares, 4, 4, 8).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 4
    assert pixel_mask(torch.tensor([[[0.0, 1.0]] * 2]), 4, 2, 3).tolist() == [[1, 1, 1]] * 2


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "DAVIS"
    write_moving_scenes(root, videos=2, frames=5, size=64)
    return root


@pytest.fixture
def davis(scenes: Path, tmp_path: Path) -> Path:
    """Two videos of five frames in the layout of DAVIS, which a test may damage."""
    return Path(shutil.copytree(scenes, tmp_path / "DAVIS"))


@pytest.fixture
def command(davis: Path, tiny_ckpt: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_ckpt}", f"--data.root={davis}", "--size=64", "--device=cpu"]
    return Evaluation(video, words, request)


def test_videos_are_measured(command: Evaluation, davis: Path, tmp_path: Path) -> None:
    """From the masks that were written, J and F again, the first and last frame left out."""
    out = tmp_path / "out"
    result = command.written(out)
    assert (result["protocol"], result["metric"]) == ("davis17-propagation/dino/64px", "J&F")
    assert (result["images"], result["details"]["objects"]) == (2, 4)
    assert "SUBSET, 2 of 30 videos" in result["details"]["data"]
    rows = []
    for name in ("scene-0", "scene-1"):
        masks = [
            [np.array(Image.open(folder / name / f"{i:05}.png")) for i in range(5)]
            for folder in (out / "masks", davis / "Annotations/480p")
        ]
        np.testing.assert_array_equal(masks[0][0], masks[1][0])
        for number in (1, 2):
            pairs = [(masks[0][i] == number, masks[1][i] == number) for i in (1, 2, 3)]
            rows.append([np.mean([score(*p) for p in pairs]) for score in (region_similarity, boundary_accuracy)])
    np.testing.assert_allclose([result["details"][m]["mean"] for m in "JF"], np.mean(rows, 0))
    assert result["value"] == pytest.approx(np.mean(rows))
    assert f"| scene-1 | 2 | {100 * np.mean(rows[2:], 0)[0]:.1f} |" in (out / "video.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["masks", "video.json", "video.md", "video.png"]
    changed = command.measure("--propagation.topk=3", "--limit=1", "--blocks=1")
    assert changed["protocol"] == "davis17-propagation/dino/64px/blocks-1 (changed)"
    assert changed["images"] == 1


@pytest.mark.parametrize(("name", "module"), [("davis17", video), ("nyuv2", depth)])
def test_files_of_protocols_are_the_defaults(name: str, module: Any) -> None:
    path = ROOT / f"configs/evaluation/{name}.yaml"
    given, default = (cli.parse(module.Settings, ["--ckpt=x", *more]) for more in (["--config", str(path)], []))
    assert given == default
    assert flat(yaml.safe_load(path.read_text())).items() <= flat(plain(default)).items()


def test_an_interrupted_run_goes_on(command: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = command.written(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(video, "score", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            command.measure("--out", tmp_path / "out")
    (log,) = (tmp_path / "out").glob("followed-*.jsonl")
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:2], lines[2][:20]]))  # the second video was cut off
    again = command.measure("--out", tmp_path / "out", "--batch-size=1")
    assert json.dumps(again["details"]["F"]) == json.dumps(whole["details"]["F"])


def test_videos_of_ones_own(command: Evaluation, davis: Path, tmp_path: Path) -> None:
    """The first frame's mask alone, then those of two frames: scored is what can be."""
    own, first = tmp_path / "mine", davis / "Annotations/480p/scene-0"
    shutil.copytree(davis / "JPEGImages/480p/scene-0", own / "images/bird")
    (own / "masks/bird").mkdir(parents=True)
    shutil.copy(first / "00000.png", own / "masks/bird")
    words = ["--data.name=videos", f"--data.root={own}"]
    result = command.written(tmp_path / "out", *words)
    assert (result["protocol"], result["value"]) == ("mine-propagation/dino/64px", None)
    assert sorted(path.name for path in (tmp_path / "out/masks/bird").iterdir())[-1] == "00004.png"
    shutil.copy(first / "00002.png", own / "masks/bird")
    scored = command.measure(*words)
    truth = np.array(Image.open(first / "00002.png"))
    found = np.array(Image.open(tmp_path / "out/masks/bird/00002.png"))
    assert scored["details"]["J"]["mean"] == pytest.approx(
        np.mean([region_similarity(found == n, truth == n) for n in (1, 2)])
    )
    shutil.copy(first / "00002.png", own / "masks/bird/00007.png")
    assert "00007.png: a mask without its frame" in command.refused(*words)
    shutil.rmtree(own / "masks")
    assert "00000.png: no such mask of a first frame" in command.refused(*words)


def test_damaged_videos_are_refused(command: Evaluation, davis: Path) -> None:
    frame, mask = (davis / f"{kind}/480p/scene-1/00003.{end}" for kind, end in
                   (("JPEGImages", "jpg"), ("Annotations", "png")))  # fmt: skip
    Image.new("L", (9, 8)).save(mask)
    assert f"{mask}: has 9 x 8 pixels, and the mask of the video's first frame 64 x 64" in command.refused()
    mask.unlink()
    assert "00003.png: no such mask (1 of 5" in command.refused()
    shutil.copy(mask.with_name("00002.png"), mask)
    Image.new("RGB", (8, 9)).save(frame)
    assert f"{frame}: has 8 x 9 pixels" in command.refused()
    frame.unlink()
    assert "00003.jpg: no such frame (1 of 5" in command.refused()
    Image.new("L", (64, 64), 255).save(mask.with_name("00000.png"))
    shutil.copy(frame.with_name("00002.jpg"), frame)
    assert "no object in this mask of a first frame" in command.refused()
    (davis / "ImageSets/2017/val.txt").write_text("../scene-1\n")
    assert "../scene-1 is no name of a folder" in command.refused()
    assert "test.txt: no such list" in command.refused("--data.split=test")
    assert "topk 1 or more" in command.refused("--propagation.topk=0")
