"""Similarity of patches against scikit-learn, and the figure of it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from skipless.eval.backbones import load_backbone
from skipless.eval.figures import similarity as module
from skipless.eval.figures.pictures import fit
from skipless.eval.figures.similarity import patch_similarity
from skipless.eval.similarity import main
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose backbone is a random ViT of three blocks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    export_backbone(folder, VisionTransformer(24, 3, 3, patch=8, image_size=32, registers=1), {})
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pixels wide and 32 high: 6 x 4 patches at their own size."""
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(path)
    return path


# Values ---------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.data())
@settings(max_examples=40)
def test_similarity_is_scikit_learns(seed: int, h: int, w: int, dim: int, data: st.DataObject) -> None:
    """Whatever the lengths; some patches have none."""
    rng = np.random.default_rng(seed)
    features = (rng.standard_normal((h, w, dim)) * rng.choice([0, 1, 1e-3, 1e3], (h, w, 1))).astype(np.float32)
    row, column = data.draw(st.integers(0, h - 1)), data.draw(st.integers(0, w - 1))
    found = patch_similarity(features, row, column)
    assert (found.shape, found.dtype) == ((h, w), np.float64)
    expected = cosine_similarity(features[row, column][None].astype(float), features.reshape(-1, dim).astype(float))
    np.testing.assert_allclose(found.ravel(), expected[0], atol=1e-9)
    assert found[row, column] == pytest.approx(float(features[row, column].any()))


@pytest.mark.parametrize(("row", "column"), [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_a_patch_outside_of_the_grid_is_an_error(row: int, column: int) -> None:
    with pytest.raises(IndexError, match=f"patch {row}, {column} lies outside of 2 x 3 patches"):
        patch_similarity(np.ones((2, 3, 4)), row, column)


@pytest.mark.parametrize(
    ("shape", "size", "patch", "expected"),
    [
        ((480, 640), 448, 14, (448, 602)),  # 597.3 is 42.7 patches
        ((640, 480), 448, 16, (592, 448)),  # 597.3 is 37.3 patches
        ((100, 100), 448, 16, (448, 448)),
        ((10, 1000), 4, 16, (16, 400)),  # a quarter of a patch becomes one
    ],
)
def test_sizes_are_rounded_to_patches(shape: tuple[int, int], size: int, patch: int, expected: tuple[int, int]) -> None:
    assert fit(np.zeros((*shape, 3), np.uint8), size, patch).shape == (*expected, 3)


# The figure -----------------------------------------------------------------------------------------------------------


def test_command_draws_points_and_blocks(ckpt: Path, photo: Path, tmp_path: Path) -> None:
    """Started from another folder; below each map its smallest value, which matplotlib leaves in an SVG as a comment.
    The point 47,31 is the last pixel, of the last patch."""
    script = [sys.executable, ROOT / "eval" / "similarity.py", "--ckpt", ckpt, "--image", photo, "--points", "47,31"]
    flags = ["9,7", "--blocks=1,3", "--size=32", "--device=cpu", "--out=figures/map.svg"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, script + flags)), capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "written: figures/map.svg\n"
    assert [path.name for path in tmp_path.glob("**/*.*")] == ["map.svg"]

    backbone = load_backbone(ckpt)
    images = backbone.normalize(np.array(Image.open(photo))[None])
    expected = []
    for row, column in ((3, 5), (0, 1)):
        for found in backbone.features(images, (0, 2)):
            patches = found.patches[0].numpy().astype(float)
            smallest = cosine_similarity(patches[row, column][None], patches.reshape(-1, 24)).min()
            expected.append(f"<!-- {smallest:.2f} to 1 -->")
    text = (tmp_path / "figures/map.svg").read_text()
    assert [text.count(label) for label in expected] == [expected.count(label) for label in expected]
    assert text.count("block 1 ") == text.count("block 3 ") == 1


def test_points_are_pixels_of_the_image_as_it_is(
    ckpt: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x to the right and y down; at twice the size an edge of 4 pixels is a patch. At 40, 60 pixels in a row are 7.5
    patches, that is 8, and 48 pixels of the image 6 each. By default, the center."""
    asked: list[tuple[int, ...]] = []
    original = patch_similarity

    def noted(features: np.ndarray, row: int, column: int) -> np.ndarray:
        asked.append((*features.shape[:2], row, column))
        return original(features, row, column)

    monkeypatch.setattr(module, "patch_similarity", noted)
    common = ["--ckpt", str(ckpt), "--image", str(photo), "--device=cpu", "--out", str(tmp_path / "map.png")]
    main([*common, "--size=32", "--points", "0,0", "7,8", "8,7", "47,31"])
    assert asked == [(4, 6, 0, 0), (4, 6, 1, 0), (4, 6, 0, 1), (4, 6, 3, 5)]
    asked.clear()
    main([*common, "--size=64", "--points", "3,4"])
    main([*common, "--size=40", "--points", "47,31", "6,6"])
    main([*common, "--size=32"])
    assert asked == [(8, 12, 1, 0), (5, 8, 4, 7), (5, 8, 0, 1), (4, 6, 2, 3)]


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_the_same_figure_is_the_same_file(
    ckpt: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    figures = []
    for name in ("a", "b"):
        out = tmp_path / f"{name}.{ending}"
        main(["--ckpt", str(ckpt), "--image", str(photo), "--size=32", "--device=cpu", "--out", str(out)])
        assert capsys.readouterr().out == f"written: {out}\n"
        figures.append(out.read_bytes())
    assert figures[0] == figures[1]
    assert len(figures[0]) > 1000
    assert not any(word in figures[0] for word in (b"CreationDate", b"dc:date"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--image=/nowhere/photo.jpg"], ["/nowhere/photo.jpg: no such image file"]),
        (["--image=."], [".: no such image file"]),
        (["--image=broken.png"], ["broken.png: the content is not that of"]),
        (["--ckpt=/nowhere/vit.pth"], ["/nowhere/vit.pth", "no such checkpoint"]),
        (["--out=map.jpg"], ["out is map.jpg; it must end in .png, .pdf, .svg"]),
        (["--points", "48,3"], ["points: 48,3 lies outside of the image, which has 48 x 32 pixels"]),
        (["--points", "3,32"], ["points: 3,32 lies outside"]),
        (["--points", "4,5", "-1,3"], ["points: -1,3 lies outside"]),
        (["--points", "4"], ["points: '4' is no point; give x,y in pixels, as in 120,80"]),
        (["--points", "4,5,6"], ["points: '4,5,6' is no point"]),
        (["--points", "4.5,6"], ["points: '4.5,6' is no point"]),
        (["--blocks=4"], ["block 4 does not exist", "1 to 3"]),
        (["--blocks=1,1"], ["names a block twice"]),
        (["--size=0"], ["size must be 1 or more"]),
        (["--device=tpu"], ["device is 'tpu'"]),
        (["--dots=3"], ["dots"]),
    ],
)
def test_bad_input_ends_with_one_sentence_and_exit_code_2(
    ckpt: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    flags: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        main(["--ckpt", str(ckpt), "--image", str(photo), "--size=32", "--device=cpu", *flags])
    assert ended.value.code == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    for word in words:
        assert word in errors
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


def test_features_that_are_no_numbers_are_refused(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = VisionTransformer(24, 2, 3, patch=8, image_size=32)
    torch.nn.init.constant_(model.blocks[1].mlp.fc2.bias, 1e30)  # type: ignore[union-attr, arg-type]
    export_backbone(tmp_path, model, {})
    with pytest.raises(SystemExit):
        main(["--ckpt", str(tmp_path), "--image", str(photo), "--device=cpu", "--out", str(tmp_path / "map.png")])
    assert f"features of block 2 of {tmp_path} are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "map.png").exists()


def test_help_says_what_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("python eval/similarity.py --ckpt", "--points 120,80 300,200", "pixels of the image", "its center"):
        assert words in text
