"""Folders of one's own images and masks: measured from end to end, and what is wrong with them."""

from pathlib import Path

import numpy as np
import pytest
from helpers import COLORS, Evaluation
from PIL import Image

from skipless.datasets.labels.own import mask_folder
from skipless.eval import report, segmentation

VALUES = np.array([7, 3, 200], np.uint8)


def write_masks(root: Path, count: int = 20) -> Path:
    """Blocks of three colors with a value each; the first mask has a pixel of 255."""
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(count):
        labels = np.kron(rng.integers(0, 3, (3, 4)), np.ones((16, 16), int))
        Image.fromarray(COLORS[labels]).save(root / f"images/{index:02}.png")
        mask = VALUES[labels]
        mask[0, 0] = 255 if index == 0 else mask[0, 0]
        Image.fromarray(mask).save(root / f"masks/{index:02}.png")
    return root


@pytest.fixture
def measured(tmp_path: Path, tiny_ckpt: Path, request: pytest.FixtureRequest) -> Evaluation:
    write_masks(tmp_path / "own")
    words = [f"--ckpt={tiny_ckpt}", "--data.name=masks", f"--data.root={tmp_path / 'own'}", "--device=cpu"]
    words += [f"--cache={tmp_path / 'cache'}", "--protocol=quick", "--quick.size=64", "--quick.images_per_step=4"]
    return Evaluation(segmentation, words, request)


def test_a_folder_is_segmented(measured: Evaluation, tmp_path: Path) -> None:
    result = measured.written(tmp_path / "out")
    assert (result["dataset"], result["images"]) == ("own", 5)
    assert result["protocol"].startswith("own-linear/quick")
    assert set(result["details"]["iou"]) == {"3", "7", "200"}
    assert result["value"] > 0.8  # colors are easy


def test_a_report_takes_a_folder(tiny_ckpt: Path, tmp_path: Path) -> None:
    """Retrieval and clustering, too."""
    words = [f"--ckpt={tiny_ckpt}", "--segmentation.name=masks", f"--segmentation.root={write_masks(tmp_path / 'own')}"]
    words += [f"--cache={tmp_path}", "--device=cpu", "--segmentation.size=64", "--count=1", f"--out={tmp_path / 'out'}"]
    report.main([*words, "--segmentation.void", "255", "200", "--tasks", "retrieval", "clustering"])
    table = (tmp_path / "out/report.md").read_text()
    assert "own-retrieval/hummingbird" in table
    assert "own-clustering/kmeans-2" in table


def test_classes_have_names(tmp_path: Path) -> None:
    root = write_masks(tmp_path)
    (root / "classes.txt").write_text("\n" * 3 + "grass\n" + "\n" * 3 + "tree\n" + "\n" * 192 + "sky\n")
    own = mask_folder(root, "all", void=(255, 3))
    assert own.classes == ("tree", "sky")
    stored, read = np.array(Image.open(root / "masks/00.png")), own.read(0)[1]
    for value, label in ((7, 0), (200, 1), (3, 255), (255, 255)):
        assert (read[stored == value] == label).all()


def test_splits(tmp_path: Path) -> None:
    """Every fourth is of val; or folders say it, whose masks tell the classes together."""
    together = write_masks(tmp_path / "together")
    split = [mask_folder(together, name).names for name in ("train", "val", "all")]
    assert split[1] == ("03", "07", "11", "15", "19")
    assert tuple(sorted(split[0] + split[1])) == split[2]
    for name in ("train", "val"):
        write_masks(tmp_path / "apart" / name, 2)
    Image.new("L", (64, 48), 9).save(tmp_path / "apart/train/masks/00.png")
    own = mask_folder(tmp_path / "apart", "val")
    assert (own.names, own.classes) == (("00", "01"), ("3", "7", "9", "200"))


def test_what_is_wrong_is_one_sentence(measured: Evaluation, tmp_path: Path) -> None:
    root = tmp_path / "own"
    (root / "classes.txt").write_text("\n" * 7 + "tree\n")
    assert "hold 3, 200, where own masks hold 7, 255 (each value needs a line in classes.txt" in measured.refused()
    (root / "classes.txt").unlink()
    assert "void is [256]; give values" in measured.refused("--data.void=256")
    assert "own: 0 classes without those that are void" in measured.refused("--data.void", 3, 7, 200, 255)
    assert "data.void is for masks" in measured.refused("--data.name=scenes", "--data.void=3")
    assert "own has no split test; without folders" in measured.refused("--data.split=test")
    small = Image.open(root / "masks/04.png").crop((0, 0, 20, 10))
    small.save(root / "masks/04.png")
    assert "has 20 x 10 pixels and its image" in measured.refused()
    (root / "masks/04.png").unlink()
    assert "masks/04.png: no such mask (1 of 20 mask files are missing)" in measured.refused()
    Image.new("RGB", (8, 8)).save(root / "images/03.jpg")
    assert "are of one name" in measured.refused()
