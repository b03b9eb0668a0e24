"""The page of a run that is under way."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from helpers import call, logged, refusal, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from skipless.eval import watch
from skipless.ssl import pretrain

TINY = [
    "--model.dim=24", "--model.depth=2", "--model.heads=2", "--model.patch=8", "--crops.global_crops_size=32",
    "--crops.local_crops_number=0", "--dino.out_dim=32", "--dino.hidden_dim=32", "--dino.bottleneck_dim=16",
    "--dino.freeze_last_layer=0", "--optimizer.warmup_epochs=0", "--batch_size=8", "--epochs=2", "--log_every=1",
    "--monitor.every_epochs=1", "--monitor.pictures=3", "--device=cpu", "--precision=fp32",
]  # fmt: skip
STEPS = [0, 2, 4]


@pytest.fixture(scope="module")
def unlabeled(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on images without classes."""
    out = tmp_path_factory.mktemp("runs") / "a<b"
    done = call(pretrain.main, ["--data.path", photos / "stripes", "--out", out, *TINY])
    assert done.returncode == 0, done.stderr
    assert "epoch 1: patches of 3 images, last block: mean share" in done.stderr
    assert len(re.findall("tells images apart by", done.stderr)) == 2  # after each epoch
    return out


def test_a_monitor_leaves_pictures(unlabeled: Path) -> None:
    names = {"images-0.png", *(f"pca-{step}.png" for step in STEPS)}
    assert {path.name for path in (unlabeled / "pictures").iterdir()} == names
    events = EventAccumulator(str(unlabeled / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("pictures/pca")] == STEPS
    assert all(len(values) == 2 and min(values) >= 1 for values in logged(unlabeled, "monitor/effective_rank"))


def test_the_page_is_whole_and_needs_nothing_else(unlabeled: Path, tmp_path: Path) -> None:
    labeled = tmp_path / "labeled"
    labeled.mkdir()
    (labeled / "settings.yaml").write_text("epochs: 10\n")
    lines = [{"step": 0, "epoch": 0.0, "monitor/knn": [0.2, 0.3]}, {"step": 8, "epoch": 4.0, "monitor/knn": [0.2, 0.5]}]
    (labeled / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    watch.main([str(unlabeled), str(labeled), f"{unlabeled}/", "--once"])  # one run twice is one run
    page = (unlabeled / "watch.html").read_text()
    assert 'http-equiv="refresh"' not in page
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*', page) == []
    assert "<title>a&lt;b, labeled</title>" in page
    assert "it learns: k-NN of the last block is 50.0 %, and was 30.0 % at the start" in page
    assert re.search(r"labeled</strong>: epoch 4\.0 of 10, \d+ s ago", page)
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    assert titles[:2] == ["loss", "k-NN accuracy of the last block, %"]
    assert {"learning rate", "effective rank of an image&#39;s patches, last block"} <= {*titles}
    assert re.findall(r"<span>(.*?)</span><img", page) == ["images", "epoch 2", "epoch 1", "epoch 0"]


def test_the_page_is_renewed_until_the_run_ends(unlabeled: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unlabeled, tmp_path / "run", ignore=shutil.ignore_patterns("watch.html"))
    end = (run / "backbone.json").rename(tmp_path / "end.json")
    running, page = start("skipless.eval.watch", [run, "--every", 1]), run / "watch.html"
    while not page.exists():
        time.sleep(0.05)
    assert 'http-equiv="refresh" content="1"' in page.read_text()
    end.rename(run / "backbone.json")
    assert running.wait(60).returncode == 0
    assert "refresh" not in page.read_text()
    assert "finished" in page.read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(watch.main, [tmp_path], capsys) == f"{tmp_path} is no run that has begun: it has no settings.yaml"


def test_long_lines_are_means_of_neighbors() -> None:
    log = [{"epoch": i / 100, "loss": i % 2} for i in range(1200)]
    line = watch.line_of(log, "loss", 1)
    assert line is not None
    assert len(line.x) == 300
    assert {*line.y} == {0.5}
