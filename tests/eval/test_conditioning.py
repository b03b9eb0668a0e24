"""The command that compares the conditioning of models: its table, its figure, its result, its errors."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import refusal
from PIL import Image

from skipless.datasets.images import open_images
from skipless.eval.conditioning import ARMS, fresh_models, main
from skipless.eval.figures.conditioning import MEASURES, table
from skipless.eval.spectra import TOLERANCE
from skipless.ssl.data.squares import normalized_squares
from skipless.ssl.model.initialization import PRESETS, skipless_init_
from skipless.ssl.model.statistics import cheap_conditioning
from skipless.ssl.model.vit import SIZES, VisionTransformer
from skipless.ssl.run.checkpoints import export_backbone


def small_model(residual: bool) -> VisionTransformer:
    """Two blocks; the skipless one from the library's initialization."""
    torch.manual_seed(0)
    model = VisionTransformer(24, 2, 3, patch=4, residual=residual, image_size=12)
    return (model if residual else skipless_init_(model, **PRESETS["small"])).eval()  # type: ignore[return-value]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data") / "photos", np.random.default_rng(0)
    folder.mkdir()
    for number in range(5):
        rough = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported backbones in folders of the same name, damaged ones among them, and a checkpoint of DINO's."""
    root = tmp_path_factory.mktemp("runs")
    folders = {name: root / name / "run" for name in ("residual", "skipless", "damaged", "nan")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        model = small_model(residual=name == "residual")
        if name == "nan":
            torch.nn.init.constant_(model.cls_token, math.nan)
        export_backbone(folder, model, {"step": 1})
    (folders["damaged"] / "backbone.safetensors").write_bytes(b"nothing")
    torch.save(VisionTransformer(192, 1, 3, patch=8, image_size=16).state_dict(), root / "dino.pth")
    return folders | {"dino": root / "dino.pth"}


def test_command_compares_trained_models(
    photos: Path, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "found"
    words = ["--images", photos, "--ckpt", runs["residual"], runs["skipless"] / "backbone.safetensors", "--out", out]
    main([*map(str, words), "--count", "3", "--jacobian-images", "2", "--seed", "3"])
    result = json.loads(Path(f"{out}.json").read_text())
    assert [model["name"] for model in result["details"]] == ["residual/run", "skipless/run"]
    assert (result["images"], result["jacobian_images"], result["dataset"], result["seed"]) == (3, 2, "photos", 3)
    assert {"hardware", "versions", "commit", "seconds"} <= set(result)
    residual, skipless = (model["statistics"] for model in result["details"])
    assert set(MEASURES) <= set(skipless)
    assert "attention_skip_condition" in residual
    assert "attention_skip_condition" not in skipless
    assert all(len(values) == 2 for values in [*residual.values(), *skipless.values()])
    assert skipless["value_output_condition"] == pytest.approx([1, 1], abs=1e-4)
    page = Path(f"{out}.md").read_text()
    assert capsys.readouterr().out == f"{page}written: {out}.png\n"
    assert "| residual/run: with its skip (K + I) | " in page
    assert str(runs["residual"]) not in page + Path(f"{out}.json").read_text()
    with Image.open(f"{out}.png") as figure:
        assert min(figure.size) > 1000


def test_command_compares_initializations(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mirrored initialization keeps tokens apart where the default one, without skips, does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SIZES, "tiny", {"dim": 96, "depth": 12, "heads": 3})  # half the width, for time
    words = ["--images", str(photos), "--size", "tiny", "--pixels", "32", "--count", "5", "--out=all"]
    main([*words, "--cheap", "--figure", "figure.svg"])
    assert "### Mean share of patch tokens" in capsys.readouterr().out
    assert Path("figure.svg").read_text().startswith("<?xml")
    details = json.loads(Path("all.json").read_text())["details"]
    assert [model["name"] for model in details] == list(ARMS)
    share = {model["name"]: model["statistics"]["mean_share"][-1] for model in details}
    assert share["skipless, default"] > 0.99
    assert share["skipless, mirrored, beta 4"] < 0.9
    assert share["skipless, small (the same, whitened)"] < share["skipless, mirrored, beta 4"]
    images = normalized_squares(open_images(photos), 5, 32)
    first = next(fresh_models("tiny", images, seed=0))
    assert cheap_conditioning(first.model, images) == details[0]["statistics"]


def test_table_marks_bounds() -> None:
    values = {
        "mean_share": [0.5, 0.25],
        "attention_condition": [10.0, 2e6],
        "attention_smallest": [1.0, 1e-6],
        "attention_smallest_error": [0.0, 2 * TOLERANCE],
        "attention_skip_condition": [2.0, 3.0],
        "attention_skip_smallest_error": [0.0, 0.0],
    }
    lines = table({"arm": values}).splitlines()
    assert "| arm | 10 | ≥ 2e+06 |" in lines
    assert "| arm | 1 | ≤ 1e-06 |" in lines
    assert "| arm: with its skip (K + I) | 2 | 3 |" in lines
    assert "| arm | 0.5 | 0.25 |" in lines


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--images nowhere", "nowhere"),
        ("--images {photos} --count 0", "--count is 0"),
        ("--images {photos} --seed -1", "seed is -1"),
        ("--images {photos} --pixels 50", "a multiple of their patch, 16"),
        ("--images {photos} --figure figure.bmp", "must end in .png"),
        ("--images {photos} --ckpt nowhere", "nowhere: no such checkpoint"),
        ("--images {photos} --ckpt {residual} {residual}", "names a run twice"),
        ("--images {photos} --ckpt {residual} --pixels 30", "a multiple of its patch, 4"),
        ("--images {photos} --ckpt {damaged}", "is damaged"),
        ("--images {photos} --ckpt {dino}", "is no backbone of a pretraining run"),
        ("--images {photos} --ckpt {nan}", "NaN or infinite weights"),
        ("--images {photos} --ckpt {residual} --size tiny", "give one of them"),
    ],
)
def test_bad_input_is_one_sentence(
    words: str,
    sentence: str,
    photos: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in refusal(main, [*words.format(photos=photos, **runs).split(), "--out", "new/out"], capsys)
    assert not list(tmp_path.iterdir())
