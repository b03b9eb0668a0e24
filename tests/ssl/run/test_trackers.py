"""What a run tells other trackers than its own files: each of them offline, where it is installed."""

import importlib.util
import json
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import call

from skipless.ssl import supervised
from skipless.ssl.run import trackers
from skipless.ssl.run.trackers import Tracker, TrackerName

PICTURE = np.full((8, 12, 3), (200, 100, 0), np.uint8)


def of_mlflow(_: Path) -> list[float]:
    import mlflow

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(trackers.PROJECT).experiment_id])
    assert any("pictures" in file.path or file.is_dir for file in client.list_artifacts(run.info.run_id, "images"))
    return [metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def of_trackio(folder: Path) -> list[float]:
    with sqlite3.connect(folder.parent / "trackio" / f"{trackers.PROJECT}.db") as database:
        lines = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _, _ in lines} == {folder.name}
    return [values["train/loss"] for values in (json.loads(text) for _, _, text in lines) if "train/loss" in values]


def of_wandb(folder: Path) -> list[float]:
    assert list(folder.glob("wandb/offline-run-*/files/media/**/*.png"))
    written = b"".join(path.read_bytes() for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")))
    return sorted({float(value) for value in re.findall(rb"train/loss[^0-9]{1,8}([0-9.]+)", written)})


@pytest.mark.parametrize(("name", "losses"), [("mlflow", of_mlflow), ("trackio", of_trackio), ("wandb", of_wandb)])
def test_a_resumed_run_is_one_run(
    name: TrackerName, losses: Callable[[Path], list[float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in {
        "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlflow", "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_MODE": "offline", "WANDB_SILENT": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    pytest.importorskip(name, reason=f"{name} is not installed")
    folder = tmp_path / "it's a run"
    folder.mkdir()
    for step in (1, 2):
        tracker = Tracker(name, folder, {"epochs": 3}, resumed=step > 1)
        tracker.metrics({"train/loss": 10.0 * step}, step)
        tracker.picture("pictures/pca", PICTURE, step)
        tracker.close()
    assert losses(folder) == [10, 20]


FAKE = """
lines = []
def init(**words): lines.append(words)
def log(values, step): lines.append((step, values))
def finish(): lines.append("finished")
"""


def test_a_run_tells_its_tracker_what_it_logs(
    color_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    words: list[Any] = ["--data.root", color_classes, "--out", tmp_path / "run", "--wandb", "--epochs=1"]
    words += ["--model.dim=24", "--model.depth=1", "--model.heads=2", "--model.patch=8", "--augmentation.size=16"]
    words += ["--batch_size=15", "--optimizer.warmup_epochs=0", "--log_every=1", "--device=cpu"]
    done = call(supervised.main, words)
    assert done.returncode == 0, done.stderr
    import wandb

    first, *logged, last = wandb.lines
    assert re.fullmatch(r"run-[0-9a-f]{8}", first["id"])
    assert (first["name"], first["config"]["epochs"], last) == ("run", 1, "finished")
    steps = [values for _, values in logged if "train/loss" in values]
    assert [step for step, values in logged if "train/loss" in values] == [1, 2]
    assert {"schedule/lr", "speed/images_per_second", "train/gradient_norm"} <= steps[0].keys()
    assert any("val/top1" in values for _, values in logged)


def test_a_run_that_begins_anew_is_another_and_a_resumed_one_the_same(tmp_path: Path) -> None:
    assert trackers.own_name(tmp_path, resumed=True) == tmp_path.name  # of one that began before names had an end
    first = trackers.own_name(tmp_path, resumed=False)
    assert trackers.own_name(tmp_path, resumed=True) == first
    assert trackers.own_name(tmp_path, resumed=False) != first


def test_a_tracker_that_does_not_begin_is_told_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("def init(**_): raise RuntimeError('no key')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ValueError, match="log_to is wandb, which does not begin: no key"):
        Tracker("wandb", tmp_path, {}, False)


def test_a_tracker_that_is_missing_is_named(
    color_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest))
    done = call(supervised.main, ["--data.root", color_classes, "--out", tmp_path / "run", "--log-to=mlflow"])
    assert done.returncode == 2
    assert "pip install mlflow" in done.stderr
    assert not (tmp_path / "run").exists()
