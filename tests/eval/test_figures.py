"""The commands that draw figures: PCA pictures, attention maps, similarity."""

import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refusal, run
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity

from skipless.eval import attention_maps, pca, similarity
from skipless.eval.backbones import load_backbone
from skipless.eval.figures.pictures import pick_images
from skipless.eval.figures.similarity import draw_similarity, patch_similarity
from skipless.ssl.model.vit import VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone

MAINS: dict[str, Callable[[list[str]], None]] = {
    "pca": pca.main,
    "attention_maps": attention_maps.main,
    "similarity": similarity.main,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small ViTs of three blocks and a broken one; three images of different proportions, with a mask for each."""
    root = tmp_path_factory.mktemp("figures")
    for seed, name in enumerate(("vit", "other", "broken")):
        torch.manual_seed(seed)
        model = VisionTransformer(24, 3, 3, patch=8, image_size=32, registers=2)
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        if name == "broken":
            torch.nn.init.constant_(model.blocks[1].mlp.fc2.bias, 1e30)  # type: ignore[union-attr, arg-type]
        (root / name).mkdir()
        export_backbone(root / name, model, {})
    (root / "images").mkdir()
    (root / "masks").mkdir()
    rng = np.random.default_rng(6)
    for name, size in (("a", (48, 32)), ("b", (30, 50)), ("c", (33, 33))):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.NEAREST).save(root / "images" / f"{name}.png")
        mask = np.zeros(size[::-1], np.uint8)
        mask[:, : size[0] // 2] = 7
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
    with zipfile.ZipFile(root / "a.zip", "w") as archive:
        archive.write(root / "images" / "a.png", "a.png")
    return root


def words(folder: Path, command: str, *more: object) -> list[str]:
    """A command's words for images/a.png; what comes later wins."""
    images = "--image" if command == "similarity" else "--images"
    first = ["--ckpt", folder / "vit", images, folder / "images" / "a.png", "--size=32", "--device=cpu"]
    return [str(word).format(folder=folder) for word in [*first, *more]]


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
@pytest.mark.parametrize("command", MAINS)
def test_the_same_figure_is_the_same_file(
    command: str, ending: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the image comes from an archive."""
    figures = []
    for name, more in (("one", []), ("two", [] if command == "similarity" else ["--images={folder}/a.zip"])):
        out = tmp_path / "made" / f"{name}.{ending}"
        MAINS[command](words(folder, command, "--out", out, *more))
        assert capsys.readouterr().out == f"written: {out}\n"
        figures.append(out.read_bytes())
    assert figures[0] == figures[1]
    assert b"/Type3" not in figures[0]  # fonts that publishers refuse
    assert not any(word in figures[0] for word in (b"CreationDate", b"dc:date"))
    if ending == "png":
        with Image.open(out) as figure:
            figure.load()
            assert min(figure.size) > 200


def test_similarity_of_points_in_blocks(folder: Path, tmp_path: Path) -> None:
    """Started from another folder. All maps share one scale. The point 47,31 is the last pixel, of the last patch."""
    more = ["--points", "47,31", "9,7", "--blocks=1,3", "--out=figures/map.svg"]
    done = run("eval/similarity.py", words(folder, "similarity", *more), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "written: figures/map.svg\n"), done.stderr
    assert [path.name for path in tmp_path.glob("**/*.*")] == ["map.svg"]
    text = (tmp_path / "figures/map.svg").read_text()
    assert text.count("block 1 ") == text.count("block 3 ") == text.count("cosine similarity") == 1
    picture = np.array(Image.open(folder / "images" / "a.png"))
    backbone = load_backbone(folder / "vit")
    features = [f.patches[0].numpy() for f in backbone.features(backbone.normalize(picture[None]), (0, 2))]
    figure = draw_similarity(picture, [(47, 31), (9, 7)], dict(enumerate(features)))
    drawn = [axis.images[0] for axis in figure.axes if axis.images and axis.images[0].get_array().ndim == 2]
    expected = [
        cosine_similarity(grid[row, column][None].astype(float), grid.reshape(-1, 24)).reshape(4, 6)
        for row, column in ((3, 5), (0, 1))
        for grid in features
    ]
    for image, values in zip(drawn, expected, strict=True):
        np.testing.assert_allclose(image.get_array(), values, atol=1e-6)
        assert image.get_clim() == pytest.approx((min(map(np.min, expected)), 1))


def test_points_are_pixels_of_the_image_as_it_is(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x to the right and y down; at twice the size an edge of 4 pixels is a patch. At 40, 60 pixels in a row are 7.5
    patches, that is 8, and 48 pixels of the image 6 each. By default, the center."""
    asked: list[tuple[int, ...]] = []

    def noted(features: np.ndarray, row: int, column: int) -> np.ndarray:
        asked.append((*features.shape[:2], row, column))
        return patch_similarity(features, row, column)

    monkeypatch.setattr("skipless.eval.figures.similarity.patch_similarity", noted)
    for more in (["--points", "0,0", "7,8", "8,7", "47,31"], ["--size=64", "--points", "3,4"],
                 ["--size=40", "--points", "47,31", "6,6"], []):  # fmt: skip
        similarity.main(words(folder, "similarity", "--out", tmp_path / "map.svg", *more))
    expected = [(4, 6, 0, 0), (4, 6, 1, 0), (4, 6, 0, 1), (4, 6, 3, 5)]
    assert asked == [*expected, (8, 12, 1, 0), (5, 8, 4, 7), (5, 8, 0, 1), (4, 6, 2, 3)]


def test_features_that_are_no_numbers_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [f"--ckpt={folder}/broken", "--out", tmp_path / "map.png"]
    line = refusal(similarity.main, words(folder, "similarity", *more), capsys)
    assert f"features of block 3 of {folder}/broken are NaN or infinite" in line
    assert not list(tmp_path.iterdir())


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_blocks_and_images_have_a_column_and_a_row_each(folder: Path, tmp_path: Path) -> None:
    more = ["--images={folder}/images", "--blocks=1,2", "--out", tmp_path / "a.png"]
    pca.main(words(folder, "pca", *more))
    height, width, _ = pixels(tmp_path / "a.png").shape
    assert width == 3 * 400
    assert height > 400 * (32 / 48 + 50 / 30 + 1) - 10


@pytest.mark.parametrize(
    "more",
    [
        ["--foreground=pca", "--style=dinov3", "--upsample", "--smooth=0.5"],
        ["--foreground=mask", "--masks={folder}/masks"],
        ["--per-image", "--count=2", "--blocks=1,3"],
        ["--remove-position", "--upsample=false", "--layout=columns"],
    ],
)
def test_variants(folder: Path, tmp_path: Path, more: list[str]) -> None:
    pca.main(words(folder, "pca", "--images={folder}/images", "--out", tmp_path / "a.png", *more))
    assert pixels(tmp_path / "a.png").std() > 10


def test_many_images_stand_side_by_side_and_the_width_is_that_asked_for(folder: Path, tmp_path: Path) -> None:
    pca.main(words(folder, "pca", "--images={folder}/images", "--width=3.3", "--out", tmp_path / "a.png"))
    height, width, _ = pixels(tmp_path / "a.png").shape
    assert width == 660
    assert height < 440  # two rows; one image is as wide as the two others


def test_names_are_the_titles_of_three_checkpoints(folder: Path, tmp_path: Path) -> None:
    models = ["--ckpt=null", "--compare", "{folder}/vit", "{folder}/other", "{folder}/vit"]
    pca.main(words(folder, "pca", *models, "--names", "One", "Two", "Three", "--out", tmp_path / "a.svg"))
    text = (tmp_path / "a.svg").read_text()
    assert [text.count(f"<!-- {name} -->") for name in ("One", "Two", "Three", "vit")] == [1, 1, 1, 0]


def test_colors_that_show_the_place_alone_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slope(*_: object) -> list[np.ndarray]:
        rows, columns = np.meshgrid(np.arange(6.0), np.arange(8.0), indexing="ij")
        noise = 0.1 * np.random.default_rng(0).standard_normal((6, 8, 4))
        return [np.stack([rows, columns, rows + columns, rows], -1) + noise]

    monkeypatch.setattr("skipless.eval.pca.patch_features", slope)
    pca.main(words(folder, "pca", "--out", tmp_path / "a.png"))
    assert re.search(r"note: (99|100) % of what the colors of block 3 show is the place", capsys.readouterr().out)
    pca.main(words(folder, "pca", "--remove-position", "--out", tmp_path / "b.png"))
    assert "note" not in capsys.readouterr().out


def test_comparison_of_a_model_with_itself_is_the_same_picture_twice(folder: Path, tmp_path: Path) -> None:
    one, other = str(folder / "vit"), str(folder / "other")
    flags = ["--images", str(folder / "images" / "c.png"), "--size=32", "--out", str(tmp_path / "same.png")]
    pca.main(["--compare", one, one, *flags])
    picture = pixels(tmp_path / "same.png")[60:-20]
    third = picture.shape[1] // 3
    assert np.abs(picture[:, third + 20 : 2 * third - 20] - picture[:, 2 * third + 20 : 3 * third - 20]).mean() < 3
    pca.main(["--compare", one, other, *flags])


@pytest.mark.parametrize(
    ("command", "flags", "sentence"),
    [
        ("attention_maps", "--images=/nowhere", "/nowhere: no such folder or zip archive"),
        ("attention_maps", "--images=broken.png", "broken.png: the content is not that of"),
        ("attention_maps", "--ckpt=/nowhere/vit.pth", "/nowhere/vit.pth: no such checkpoint"),
        ("attention_maps", "--out=heads.jpg", "out is heads.jpg; it must end in .png, .pdf, .svg"),
        ("attention_maps", "--block=4", "block 4 does not exist: .* has blocks 1 to 3"),
        ("attention_maps", "--block=1,2", "block is '1,2'; choose one"),
        ("attention_maps", "--block=last4", "block is 'last4'; choose one"),
        ("attention_maps", "--block=first", "'first'"),
        ("attention_maps", "--count=0", "count and size must be 1 or more"),
        ("attention_maps", "--size=0", "count and size must be 1 or more"),
        ("attention_maps", "--device=tpu", "device is 'tpu'"),
        ("attention_maps", "--heads=3", "heads"),
        ("attention_maps", "--query=first", "'first' is no point"),
        ("attention_maps", "--query=1,2 --images={folder}/images", "query 1,2 is a point of one image"),
        ("similarity", "--image=/nowhere/photo.jpg", "/nowhere/photo.jpg: no such image file"),
        ("similarity", "--image=.", ".: no such image file"),
        ("similarity", "--image=broken.png", "broken.png: the content is not that of"),
        ("similarity", "--ckpt=/nowhere/vit.pth", "/nowhere/vit.pth: no such checkpoint"),
        ("similarity", "--out=map.jpg", "out is map.jpg; it must end in .png, .pdf, .svg"),
        ("similarity", "--points 48,3", "point 48,3 lies outside of the image, which has 48 x 32 pixels"),
        ("similarity", "--points 3,32", "point 3,32 lies outside"),
        ("similarity", "--points 4,5 -1,3", "point -1,3 lies outside"),
        ("similarity", "--points 4", "'4' is no point; give x,y in pixels, as in 120,80"),
        ("similarity", "--points 4,5,6", "'4,5,6' is no point"),
        ("similarity", "--points 4.5,6", "'4.5,6' is no point"),
        ("similarity", "--blocks=4", "block 4 does not exist: .* has blocks 1 to 3"),
        ("similarity", "--blocks=1,1", "names a block twice"),
        ("similarity", "--size=0", "size must be 1 or more"),
        ("similarity", "--device=tpu", "device is 'tpu'"),
        ("similarity", "--dots=3", "dots"),
        ("pca", "--compare {folder}/vit {folder}/vit", "either --ckpt CKPT or --compare A B"),
        ("pca", "--out=a.jpg", "must end in .png, .pdf, .svg"),
        ("pca", "--images={folder}/none", "no such folder"),
        ("pca", "--blocks=4", "block 4 does not exist"),
        ("pca", "--foreground=mask", "belong together"),
        ("pca", "--ckpt=null --compare {folder}/vit", "compare needs two backbones or more"),
        ("pca", "--names a b", "names has 2 titles, and the figure shows 1"),
        ("pca", "--width=0", "width is 0.0; give inches"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    flags: str,
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    line = refusal(MAINS[command], words(folder, command, *flags.split()), capsys)
    assert re.search(sentence, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


@pytest.mark.parametrize(
    ("command", "sentences"),
    [
        (
            "attention_maps",
            ["python eval/attention_maps.py --ckpt", "how much of the attention goes to CLS", ".png, .pdf or .svg"],
        ),
        (
            "similarity",
            ["python eval/similarity.py --ckpt", "--points 120,80 300,200", "pixels of the image", "its center"],
        ),
    ],
)
def test_help_says_what_is_wanted(command: str, sentences: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        MAINS[command](["--help"])
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(sentence in text for sentence in sentences)


def test_a_picture_of_one_pixel(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (1, 1), "red").save(tmp_path / "one.png")
    more = ["--images", tmp_path / "one.png", "--out", tmp_path / "a.png"]
    pca.main(words(folder, "pca", *more))
    assert (tmp_path / "a.png").exists()
    sentence = refusal(pca.main, words(folder, "pca", *more, "--size=8"), capsys)
    assert "there are 1 patches, and three colors need three: give a larger --size" in sentence


def test_images_of_a_folder_that_cannot_be_read_are_left_out_and_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = shutil.copytree(folder / "images", tmp_path / "images")
    (images / "b.png").write_bytes(b"no image")
    assert [name for name, _ in pick_images(images, 3)] == ["a.png", "c.png"]
    assert "left out:" in (said := capsys.readouterr().err)
    assert "b.png" in said
    for name in ("a.png", "c.png"):
        (images / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of 3 images of .* can be read"):
        pick_images(images, 3)
