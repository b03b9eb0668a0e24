"""Linear segmentation as a user runs it: what it finds on pictures that are easy, what it leaves, and its errors."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers import ROOT, Evaluation, run, run_group, tiny_vit
from PIL import Image
from safetensors.torch import save_file

from skipless.common import cli
from skipless.datasets.labels.masks import VOID
from skipless.eval import segmentation as module
from skipless.eval.dense.report import at_size, image_score
from skipless.eval.segmentation import Settings, changed_settings, recipe

NAMES = ("background", "aeroplane", "bicycle")
# mmseg with everything a sixteenth, and a short schedule.
SHORT = [
    "--protocol=mmseg", "--training.augmentation.size=32", "--training.augmentation.scale=[128,32]",
    "--training.inference.scale=[128,32]", "--training.inference.window=32", "--training.inference.stride=21",
    "--training.optimizer.iterations=40", "--training.optimizer.warmup=5", "--training.optimizer.batch_size=8",
    "--training.optimizer.lr=0.01",
]  # fmt: skip
QUICK = ["--protocol=quick", "--quick.size=64", "--quick.epochs=10", "--quick.images_per_step=4"]


def parse(words: list[str]) -> Settings:
    return cli.parse(Settings, words, recipe=recipe)


@pytest.fixture
def segmentation(tiny_voc: Path, tiny_ckpt: Path, cache: Path, request: pytest.FixtureRequest) -> Evaluation:
    words = [f"--ckpt={tiny_ckpt}", "--data.name=voc12", f"--data.root={tiny_voc}", f"--cache={cache}", "--device=cpu"]
    return Evaluation(module, words, request)


def test_command_leaves_a_result_a_table_and_pictures(segmentation: Evaluation, tmp_path: Path) -> None:
    assert "must end in .png" in segmentation.refused("--figure", tmp_path / "sheet.bmp")
    flags = [*QUICK, "--every-block", "--out", tmp_path / "out", "--figure", tmp_path / "sheet.svg"]
    done = run("skipless.eval.segmentation", segmentation.line(*flags))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    result = json.loads((out / "segmentation.json").read_text())
    assert (result["dataset"], result["protocol"]) == ("voc12", "voc12-linear/quick (changed)")
    assert result["checkpoint"]["architecture"] == "ViT-Ti/8, 2 blocks, 192 wide, residual, 3 heads assumed"
    assert result["settings"]["quick"]["size"] == 64
    assert set(result["details"]["changed_settings"]) == {"quick.size", "quick.epochs", "quick.images_per_step"}

    # Colors are separable, but the best of a patch of 8 pixels is not quite the best of every pixel.
    assert 0.8 < result["value"] <= 1
    assert result["value"] <= result["details"]["pixel_accuracy"] <= 1
    iou = result["details"]["iou"]
    assert np.mean([iou[name] for name in NAMES]) == pytest.approx(result["value"])
    assert all(value is None for name, value in iou.items() if name not in NAMES)
    assert len(iou) == 21

    sheet = (tmp_path / "sheet.svg").read_text()
    assert {f"<!-- {name} -->" for name in NAMES} <= set(re.findall("<!--.*?-->", sheet))
    assert re.search(r"<!-- mIoU \d+\.\d -->", sheet)

    table = (out / "segmentation.md").read_text()
    assert f"| 2 | {100 * result['value']:.1f} |" in table
    assert f"| bicycle | {100 * iou['bicycle']:.1f} |" in table
    assert table.strip() in done.stdout


def test_scores_of_an_image_and_its_labels_at_another_size() -> None:
    mask, labels = np.array([[0, 0], [1, VOID]], np.uint8), np.array([[0, 1], [1, 1]], np.uint8)
    assert image_score(mask, labels, 3) == "mIoU 50.0"  # of both classes one pixel of two; the third is nowhere
    assert image_score(np.full((2, 2), VOID, np.uint8), labels, 3) == "all void"
    assert at_size(labels, 4, 2).tolist() == [[0, 1], [0, 1], [1, 1], [1, 1]]


def test_same_seed_same_result(segmentation: Evaluation, cache: Path, tmp_path: Path) -> None:
    """Also with features from the cache, and with other batches of the backbone."""
    flags = [*QUICK, "--blocks=last4"]
    one, same = (segmentation.measure(*flags) for _ in range(2))
    fresh = segmentation.measure(*flags, "--cache", tmp_path / "cache", "--batch_size=1")
    assert one["details"]["blocks"] == [1, 2]
    assert one["value"] == same["value"]
    assert one["details"]["iou"] == same["details"]["iou"]
    assert fresh["value"] == pytest.approx(one["value"], abs=2e-3)  # sums in another order


def test_mmseg_solves_colors_and_keeps_its_head(segmentation: Evaluation, tmp_path: Path) -> None:
    out = tmp_path / "out"
    segmentation.run(*SHORT, "--every-block", "--out", out)
    result = json.loads((out / "segmentation.json").read_text())
    assert result["protocol"] == "voc12-linear/mmseg (changed)"
    assert result["value"] > 0.8
    assert all(0.6 < entry["miou"] <= 1 for entry in result["details"]["every_block"])
    files = ["head.pt", "segmentation.json", "segmentation.md", "segmentation.png"]
    assert sorted(path.name for path in out.iterdir()) == files
    assert torch.load(out / "head.pt", weights_only=True)["heads.1.2.weight"].shape == (21, 192, 1, 1)


def test_figures_are_of_the_labels_not_of_chance(segmentation: Evaluation, tiny_voc: Path, tmp_path: Path) -> None:
    """With the masks of validation exchanged among the images, little is left."""
    data = tmp_path / "VOCdevkit"
    shutil.copytree(tiny_voc, data)
    masks = Path("VOC2012", "SegmentationClass")
    for index in range(4):
        shutil.copy(tiny_voc / masks / f"val{(index + 1) % 4:02}.png", data / masks / f"val{index:02}.png")
    assert segmentation.measure("--data.root", data, *QUICK)["value"] < 0.4


def test_two_processes_train_the_head_of_one(segmentation: Evaluation, tmp_path: Path) -> None:
    """Same head, same running statistics, same counts: with void pixels that are unevenly spread, too."""
    flags = [*SHORT, "--training.optimizer.iterations=10", "--seed=5", "--out"]
    run_group("skipless.eval.segmentation", segmentation.line(*flags, tmp_path / "two"))
    two = json.loads((tmp_path / "two" / "segmentation.json").read_text())
    one = segmentation.measure(*flags, tmp_path / "one")
    assert (two["processes"], one["processes"]) == (2, 1)
    assert two["value"] == pytest.approx(one["value"], abs=2e-3)
    assert two["details"]["pixel_accuracy"] == pytest.approx(one["details"]["pixel_accuracy"], abs=2e-3)
    heads = [torch.load(tmp_path / name / "head.pt", weights_only=True) for name in ("two", "one")]
    torch.testing.assert_close(*heads, rtol=1e-3, atol=1e-4)


SOURCE = ["--ckpt=x", "--data.name=voc12", "--data.root=x"]


@pytest.mark.parametrize("protocol", ["mmseg", "dinov3", "neco", "quick"])
def test_recipe_is_its_protocol_and_says_so(protocol: str) -> None:
    settings = parse([f"--protocol={protocol}", *SOURCE])
    assert settings.protocol == protocol
    assert changed_settings(settings) == {}
    recipe = ROOT / "configs" / "segmentation" / f"{protocol}.yaml"
    assert f"configs/segmentation/{protocol}.yaml" in recipe.read_text().split("\nprotocol:")[0]
    assert changed_settings(parse(["--config", str(recipe), *SOURCE])) == {}


def test_printed_settings_are_those_of_the_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--protocol=neco", *SOURCE, "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["protocol"] == "neco"
    assert printed["training"]["optimizer"]["batch_size"] == 128
    assert printed["training"]["optimizer"]["iterations"] is None


def test_other_blocks_are_named_in_the_id(segmentation: Evaluation) -> None:
    result = segmentation.measure(*QUICK, "--blocks=1,2")
    assert result["protocol"] == "voc12-linear/quick/blocks-1-2 (changed)"
    assert "training" not in result["settings"]


@pytest.mark.parametrize(
    ("protocol", "flag", "used"),
    [
        ("quick", "quick.size", 224),
        ("quick", "quick.learning_rates", [0.5]),
        ("mmseg", "training.optimizer.iterations", 100),
        ("mmseg", "training.augmentation.scale", [2048, 448]),
        ("dinov3", "training.head.dropout", 0.0),
        ("neco", "training.inference.grid", 448),
    ],
)
def test_any_changed_setting_is_named(protocol: str, flag: str, used: Any) -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "segmentation" / f"{protocol}.yaml").read_text())
    for part in flag.split("."):
        recipe = recipe[part]
    settings = parse([f"--protocol={protocol}", *SOURCE, f"--{flag.replace('_', '-')}={json.dumps(used)}"])
    assert changed_settings(settings) == {flag: [recipe, used]}


@pytest.mark.parametrize(("protocol", "flag"), [("mmseg", "--quick.size=64"), ("quick", "--training.head.dropout=0.1")])
def test_setting_of_the_other_kind_of_protocol_is_refused(protocol: str, flag: str) -> None:
    settings = parse([f"--protocol={protocol}", *SOURCE, flag])
    with pytest.raises(ValueError, match=f"has no effect on the protocol {protocol}"):
        changed_settings(settings)


def damage_missing_mask(folder: Path) -> None:
    (folder / "SegmentationClass/train03.png").unlink()


def damage_label(folder: Path) -> None:
    path = folder / "SegmentationClass/train03.png"
    labels = np.array(Image.open(path))
    labels[1, 1] = 33
    Image.fromarray(labels).save(path)


def damage_jpeg(folder: Path) -> None:
    path = folder / "JPEGImages/train03.jpg"
    path.write_bytes(path.read_bytes()[:700])


def damage_size(folder: Path) -> None:
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(folder / "SegmentationClass/train03.png")


@pytest.mark.parametrize("protocol", ["quick", "mmseg"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_missing_mask, ["SegmentationClass/train03.png: no such mask"]),
        (damage_label, ["SegmentationClass/train03.png: 1 of 5120 pixels hold 33"]),
        (damage_jpeg, ["JPEGImages/train03.jpg"]),
        (damage_size, ["SegmentationClass/train03.png", "64 x 64", "80 x 64"]),
    ],
)
def test_damaged_data_is_named(
    segmentation: Evaluation, tiny_voc: Path, tmp_path: Path, protocol: str, damage: Any, words: list[str]
) -> None:
    data = tmp_path / "VOCdevkit"
    shutil.copytree(tiny_voc, data)
    damage(data / "VOC2012")
    flags = QUICK if protocol == "quick" else SHORT
    last = segmentation.refused("--data.root", data, "--cache", tmp_path / "cache", *flags, "--out", tmp_path / "out")
    for word in words:
        assert word in last
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("damage", [damage_label, damage_size])
def test_masks_are_checked_when_features_are_there_already(
    segmentation: Evaluation, tiny_voc: Path, tmp_path: Path, damage: Any
) -> None:
    data = tmp_path / "VOCdevkit"
    shutil.copytree(tiny_voc, data)
    words = ["--data.root", data, "--cache", tmp_path / "cache", *QUICK]
    segmentation.measure(*words, "--quick.epochs=1")
    damage(data / "VOC2012")
    assert "SegmentationClass/train03.png" in segmentation.refused(*words)


class RunsCode:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch executed",)


def test_another_training_split_is_a_changed_setting() -> None:
    assert changed_settings(parse([*SOURCE, "--data.train_split=train"])) == {}
    changed = {"data.train_split": ["train", "trainval"]}
    assert changed_settings(parse([*SOURCE, "--data.train_split=trainval"])) == changed


def test_checkpoint_with_code_in_it_is_refused(
    segmentation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": tiny_vit(192, image_size=64).state_dict(), "more": RunsCode()}, tmp_path / "evil.pth")
    last = segmentation.refused("--ckpt", tmp_path / "evil.pth", "--cache", tmp_path / "cache", *QUICK)
    assert "evil.pth" in last
    assert "could run code" in last
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("flags", [QUICK, SHORT])
def test_numbers_that_are_none_are_refused(segmentation: Evaluation, tmp_path: Path, flags: list[str]) -> None:
    tensors = tiny_vit(192, image_size=64).state_dict()
    save_file(tensors | {"norm.bias": torch.full((192,), torch.nan)}, tmp_path / "nan.safetensors")
    last = segmentation.refused("--ckpt", tmp_path / "nan.safetensors", "--cache", tmp_path / "cache", *flags)
    assert "nan.safetensors has NaN or infinite weights, in norm.bias" in last
    # Finite weights whose features overflow.
    save_file(tensors | {"blocks.1.mlp.fc2.bias": torch.full((192,), 1e30)}, tmp_path / "huge.safetensors")
    last = segmentation.refused("--ckpt", tmp_path / "huge.safetensors", "--cache", tmp_path / "cache", *flags)
    assert "huge.safetensors" in last
    assert "are NaN or infinite" in last


def test_underscores_and_dashes_are_one() -> None:
    words = [["--batch-size=3", "--every-block", "--data.train-split=a-b"]]
    words.append(["--batch_size", "3", "--every_block", "--data.train_split", "a-b"])
    one, two = (parse([*SOURCE, *flags]) for flags in words)
    assert one == two
    assert (one.batch_size, one.every_block, one.data.train_split) == (3, True, "a-b")


def test_held_out_images_without_a_label_are_named(segmentation: Evaluation, tiny_voc: Path, tmp_path: Path) -> None:
    data = shutil.copytree(tiny_voc, tmp_path / "VOCdevkit")
    Image.fromarray(np.full((64, 80), 255, np.uint8)).save(data / "VOC2012/SegmentationClass/train09.png")
    sentence = segmentation.refused("--data.root", data, "--cache", tmp_path / "cache", *QUICK)
    assert "the 1 images that are held out to choose the learning rate have no labeled pixel (train09" in sentence
