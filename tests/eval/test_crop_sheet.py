"""The command that draws the crops of one image."""

import os
from pathlib import Path

import pytest
from helpers import ROOT, refusal
from PIL import Image

from skipless.eval.crop_sheet import main


@pytest.mark.parametrize(
    "local", [["--crops.local_crops_number=5"], ["--crops.local_crops_number=0"], ["--crops.local_crops_size=40"]]
)
def test_the_command_writes_a_sheet(tmp_path: Path, local: list[str]) -> None:
    Image.new("RGB", (60, 40), (250, 10, 10)).save(tmp_path / "a.png")
    probabilities = ["--crops.jitter_probability=0", "--crops.gray_probability=0", "--crops.solarize_probability=0"]
    sizes = ["--crops.global_crops_size=32", "--crops.local_crops_size=12"]
    main([f"--image={tmp_path}/a.png", f"--out={tmp_path}/sheet.png", "--seed=3", *sizes, *probabilities, *local])
    with Image.open(tmp_path / "sheet.png") as sheet:
        colors = {color for _, color in sheet.getcolors()}
    assert colors == {(250, 10, 10), (255, 255, 255)}  # red, not blue
    assert sorted(os.listdir(tmp_path)) == ["a.png", "sheet.png"]


def test_the_crops_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    recipe = ROOT / "configs/demo.yaml"  # four local crops, and an `out` of its own
    main([f"--image={tmp_path}/a.png", f"--config={recipe}", f"--out={tmp_path}/sheet.png"])
    assert "2 global, 4 local" in capsys.readouterr().out
    (tmp_path / "other.yaml").write_text("epochs: 3\n")
    line = refusal(main, [f"--image={tmp_path}/a.png", f"--config={tmp_path}/other.yaml"], capsys)
    assert "there is no setting epochs" in line


def test_the_flag_of_earlier_versions_and_the_default_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), (250, 10, 10)).save("a.png")
    main(["--show", "a.png"])
    assert sorted(os.listdir()) == ["a.png", "crops.png"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--image=nowhere.png", "--out=sheet.png"], "nowhere.png: No such file or directory"),
        (["--image=a.png", "--out=sheet.tiff"], "must end in .png or .jpg"),
        (["--image=a.png", "--out=nowhere/sheet.png"], "there is no folder nowhere"),
        (["--image=a.png", "--out=sheet.png", "--seed=-1"], "seed is -1"),
        (
            ["--image=a.png", "--out=sheet.png", "--crops.global_crops_scale=[0.5,0.1]"],
            "crops.global_crops_scale is (0.5, 0.1)",
        ),
        (["--image=a.png", "--out=sheet.png", "--crops.local_crops_number=x"], "crops.local_crops_number"),
        (["--out=sheet.png"], "image"),
    ],
)
def test_mistakes_end_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("a.png")
    assert sentence in refusal(main, arguments, capsys)
    assert os.listdir(tmp_path) == ["a.png"]
