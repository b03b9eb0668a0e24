"""A recipe for some images and some time."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import call, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from skipless.common import cli
from skipless.ssl import pretrain
from skipless.ssl.config import check
from skipless.ssl.recipe import CONFIGS, batch_for, choose, main, measure, seconds_of

SHORT = ["--epochs=1", "--optimizer.warmup_epochs=0.5", "--dino.freeze_last_layer=0.5", "--monitor.every_epochs=0"]


def base(name: str) -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize(("name", "images"), [("imagenette_cpu", 9469), ("vits16_skipless_soap", 1_281_167)])
def test_for_their_own_images_and_hours_the_published_recipes_come_out(name: str, images: int) -> None:
    usual, recipe = base(name), base(name)
    recipe["batch_size"] = batch_for(images, recipe["batch_size"])
    choose(recipe, images, usual["epochs"] * images)
    for made in (usual, recipe):
        del made["monitor"]
        made.pop("save_every_epochs", None)
    usual["dino"].setdefault("freeze_last_layer", 1.0)  # DINO's
    assert recipe == usual


@settings(max_examples=20, deadline=None)
@given(
    images=st.integers(32, 10**8),
    seen=st.floats(1, 1e12),
    name=st.sampled_from(["imagenette_cpu", "vits16_skipless_soap"]),
)
def test_whatever_comes_out_can_be_trained(images: int, seen: float, name: str) -> None:
    recipe = base(name)
    recipe["batch_size"] = batch_for(images, recipe["batch_size"])
    reasons = choose(recipe, images, seen)
    assert 4 <= recipe["batch_size"] <= images / 8
    assert recipe["epochs"] <= max(1, seen / images)
    assert str(recipe["epochs"]) in reasons[0]
    recipe["data"] = {"path": "photos"}
    words = []
    for name, value in recipe.items():
        inner = value.items() if isinstance(value, dict) else [(None, value)]
        words += [f"--{name}.{key}={item}" if key else f"--{name}={item}" for key, item in inner if item is not None]
    check(cli.parse(pretrain.Settings, words), images, "data.path", Path("photos"), torch.device("cpu"))


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172_800)])
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budget=soon"], "budget is 'soon'; give a time as 90s, 30m, 8h or 2d"),
        (["--budget=0m"], "budget is '0m'"),
        (["--out=recipe.txt"], "out is recipe.txt; a recipe ends in .yaml"),
        (["--data=nowhere"], "nowhere"),
    ],
)
def test_what_makes_no_sense_is_refused(
    photos: Path, tmp_path: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    usual = ["--data", photos, "--budget=1m", "--out", tmp_path / "mine.yaml"]
    assert sentence in refusal(main, [*usual, *words], capsys)


def test_the_speed_is_that_of_training(photos: Path) -> None:
    recipe = base("imagenette_cpu") | {"batch_size": 4, "device": "cpu", "data": {"path": str(photos)}}
    recipe["model"] |= {"dim": 24, "depth": 1}
    recipe["dino"] |= {"out_dim": 16, "hidden_dim": 16}
    recipe["optimizer"]["name"] = "adamw"
    assert 1 < measure(recipe) < 10_000
    recipe["model"]["heads"] = 7
    with pytest.raises(ValueError, match=r"training does not get through 20 steps: error: .*heads"):
        measure(recipe)


def test_a_recipe_is_written_and_trains(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """40 photographs at 100 a second for a minute: 5,400 of them, 135 epochs."""
    monkeypatch.setattr("skipless.ssl.recipe.measure", lambda _: 100.0)
    out = tmp_path / "mine.yaml"
    words = ["--data", str(photos), "--budget=1m", "--out", str(out), "--device=cpu"]
    main(words)
    printed = capsys.readouterr().out
    assert f"python ssl/pretrain.py --config {out}" in printed
    assert "135 epochs" in printed
    recipe = yaml.safe_load(out.read_text())
    assert (recipe["batch_size"], recipe["dino"]["out_dim"], recipe["epochs"]) == (4, 256, 135)
    more = ["--config", out, "--out", tmp_path / "run", "--model.depth=1", "--model.dim=24"]
    trained = call(pretrain.main, [*more, "--optimizer.name=adamw", *SHORT])
    assert trained.returncode == 0, trained.stderr
    assert "is there already" in refusal(main, words, capsys)
