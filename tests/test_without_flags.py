"""Commands that are told nothing: what they choose, that they say so, and that they overwrite nothing."""

import json
import re
from pathlib import Path

import pytest
from helpers import Done, run, run_group

from skipless.common import cli
from skipless.datasets.public import places
from skipless.datasets.public.sets import DATA_SETS
from skipless.datasets.synthetic.dataset import write_scenes
from skipless.eval import defaults, discovery, pca, segmentation
from skipless.ssl.config import Settings
from skipless.ssl.model import load
from skipless.ssl.run import defaults as pretraining


def first_line(done: Done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[0]


def test_commands_without_flags(tmp_path: Path) -> None:
    """Training by two processes, then what it left is measured; on scenes that are few and small."""
    write_scenes(tmp_path / "data/scenes", 32, 4, 32)
    scenes = "data: synthetic scenes in data/scenes; for photographs: python datasets/prepare.py "
    done, other = run_group("skipless.ssl.pretrain", [], cwd=tmp_path)
    assert first_line(done) == f"{scenes}imagenette"
    assert "recipe: configs/demo.yaml, 4 epochs" in done.stdout
    assert other.stdout == ""

    done = run("skipless.eval.segmentation", ["--ckpt=runs/pretrain-1"], cwd=tmp_path)
    assert first_line(done) == f"{scenes}voc12"
    assert "protocol quick, as by default on a CPU" in done.stdout
    result = json.loads((tmp_path / "runs/segmentation-1/segmentation.json").read_text())
    assert (result["dataset"], result["images"], result["settings"]["protocol"]) == ("scenes", 4, "quick")
    done = run("skipless.eval.discovery", cwd=tmp_path)
    assert first_line(done) == f"{scenes}voc07"
    assert "checkpoint: runs/pretrain-1, the newest in runs" in done.stdout
    assert "scenes val, 4 images" in done.stdout
    assert (tmp_path / "runs/discovery-1/discovery.json").exists()
    done = run("skipless.eval.pca", ["--size=64"], cwd=tmp_path)
    assert first_line(done) == f"{scenes}voc07"
    assert done.stdout.endswith("written: runs/pca-1.png\n")
    assert (tmp_path / "runs/pca-1.png").exists()


@pytest.fixture
def nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without data and runs, in which commands start, and a package with weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "SHIPPED", tmp_path)
    (tmp_path / "tiny.safetensors").touch()
    return tmp_path


def make(*folders: str) -> None:
    for folder in folders:
        Path(folder).mkdir(parents=True)


def test_public_data_where_prepare_puts_them(nothing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("data/VOCdevkit/VOC2012/SegmentationClass", "data/VOCdevkit/VOC2012/JPEGImages", "data/VOCdevkit/VOC2007")
    masks = cli.parse(segmentation.Settings, [], recipe=segmentation.recipe, fill=segmentation.fill)
    assert (masks.data.name, masks.data.root, masks.ckpt) == ("voc12", "data/VOCdevkit", "skipless:tiny")
    assert (masks.out, masks.quick.size) == ("runs/segmentation-1", 448)
    said = capsys.readouterr().out
    assert said == "data: voc12 in data/VOCdevkit\ncheckpoint: skipless:tiny, as runs has no finished run\n"
    boxes = cli.parse(discovery.Settings, ["--ckpt=x", "--out=y"], fill=discovery.fill)
    assert (boxes.data.name, boxes.data.root, boxes.ckpt, boxes.out) == ("voc07", "data/VOCdevkit", "x", "y")
    assert pca.choose_images() == "data/VOCdevkit/VOC2012/JPEGImages"
    run = cli.parse(Settings, ["--device=cpu"], fill=pretraining.fill)
    assert (run.data.path, run.out) == ("data/VOCdevkit/VOC2012/JPEGImages", "runs/pretrain-1")
    assert run.model.depth == 12
    assert run.batch_size == 64  # of configs/imagenette_cpu.yaml


def test_scenes_are_written_once(nothing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write_few(root: Path, train: int, val: int) -> None:
        written.append((train, val))
        write_scenes(root, 2, 1, 32)

    monkeypatch.setattr(places, "write_scenes", write_few)
    for _ in range(2):
        assert pca.choose_images() == "data/scenes/val"
        assert len(list(Path("data/scenes/val").rglob("*.jpg"))) == 1
    assert written == [(2000, 200)]


def test_places_are_those_of_prepare() -> None:
    known = {part.place for data in DATA_SETS.values() for part in data.parts} | {"imagenette", "tiny-imagenet"}
    for place in (*segmentation.PLACES, *discovery.PLACES, *pca.PHOTOGRAPHS, *pretraining.PHOTOGRAPHS):
        assert any(f"{place}/".startswith(f"{part}/") for part in known), place


def test_what_is_given_is_used(nothing: Path) -> None:
    make("data/VOCdevkit/VOC2007", "runs/discovery-1")
    given = cli.parse(discovery.Settings, ["--data.name=coco", "--data.root=mine"], fill=discovery.fill)
    assert (given.data.name, given.data.root, given.out) == ("coco", "mine", "runs/discovery-2")
    own = cli.parse(Settings, ["--data.path=mine", "--model.depth=3"], fill=pretraining.fill)
    assert (own.data.path, own.out, own.epochs) == ("mine", "runs/pretrain-1", Settings.epochs)
    with pytest.raises(ValueError, match="--out is missing"):
        cli.parse(Settings, ["--data.path=mine", "--resume"], fill=pretraining.fill)
    with pytest.raises(ValueError, match=r"--data\.root is missing"):
        cli.parse(discovery.Settings, ["--ckpt=x", "--data.name=coco"], fill=discovery.fill)


def test_without_any_weights_it_says_how_to_get_them(nothing: Path) -> None:
    (nothing / "tiny.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=re.escape("train a model (skipless pretrain)")):
        defaults.choose_ckpt()
    for number in (1, 2):
        make(f"runs/{number}")
        Path(f"runs/{number}/backbone.safetensors").touch()
    assert defaults.choose_ckpt() == "runs/2"


def test_segmentation_on_a_cpu_is_quick_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = segmentation.DataSettings("voc12", "x")
    settings = segmentation.Settings("x", data=data)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert segmentation.chosen_protocol(settings) == "mmseg"
    assert segmentation.chosen_protocol(segmentation.Settings("x", data=data, device="cpu")) == "quick"
    asked = segmentation.Settings("x", data=data, device="cpu", protocol="neco")
    assert segmentation.chosen_protocol(asked) == "neco"
