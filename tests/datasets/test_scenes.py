"""Synthetic scenes: exact labels, the layout on disk, and what may and may not tell the class."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from skipless.common import processes
from skipless.datasets import scenes
from skipless.datasets.synthetic import dataset
from skipless.datasets.synthetic.dataset import write_scenes
from skipless.datasets.synthetic.drawing import CLASSES, Scene, render_scene

TRAIN, VAL, SIZE, SEED = 96, 40, 48, 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "scenes"
    write_scenes(root, TRAIN, VAL, SIZE, SEED, workers=1)
    return root


def names(root: Path, split: str, task: str = "Main") -> list[str]:
    return (root / f"VOCdevkit/VOC2012/ImageSets/{task}/{split}.txt").read_text().splitlines()


def mask(root: Path, folder: str, name: str) -> np.ndarray:
    picture = Image.open(root / f"VOCdevkit/VOC2012/{folder}/{name}.png")
    assert picture.mode == "P"
    return np.array(picture)


def contents(root: Path) -> dict[str, bytes | str]:
    """Every file below `root`: its bytes, or where it points."""
    return {
        str(path.relative_to(root)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if not path.is_dir()
    }


def same(a: Scene, b: Scene) -> bool:
    arrays = ("image", "class_mask", "instance_mask")
    return a.objects == b.objects and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)


# One scene


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32), size=st.integers(32, 96), label=st.none() | st.integers(1, 10))
def test_labels_of_a_scene_agree(seed: int, size: int, label: int | None) -> None:
    scene = render_scene(np.random.default_rng(seed), size, label)
    assert same(scene, render_scene(np.random.default_rng(seed), size, label))
    assert scene.image.shape == (size, size, 3)
    assert scene.class_mask.shape == scene.instance_mask.shape == (size, size)
    assert {array.dtype for array in (scene.image, scene.class_mask, scene.instance_mask)} == {np.dtype(np.uint8)}

    assert 1 <= len(scene.objects) <= 4
    assert set(np.unique(scene.instance_mask)) - {0} == set(range(1, len(scene.objects) + 1))
    assert np.array_equal(scene.class_mask == 0, scene.instance_mask == 0)
    areas = []
    for number, item in enumerate(scene.objects, start=1):
        rows, columns = np.nonzero(scene.instance_mask == number)
        assert item.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        assert set(scene.class_mask[rows, columns]) == {item.label}
        assert 1 <= item.label <= len(CLASSES)
        areas.append(len(rows))
    assert all(areas[0] > area >= 8 for area in areas[1:])
    if label is not None:
        assert scene.objects[0].label == label


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32))
def test_an_object_alone_is_truncated_only_by_the_border(seed: int) -> None:
    scene = render_scene(np.random.default_rng(seed), 64)
    x0, y0, x1, y1 = scene.objects[0].box
    if scene.objects[0].truncated and len(scene.objects) == 1:
        assert min(x0, y0) == 0 or max(x1, y1) == 64


def test_truncated_and_difficult_objects_occur_and_are_the_minority() -> None:
    drawn = [item for seed in range(200) for item in render_scene(np.random.default_rng(seed), 48).objects]
    truncated, difficult = sum(item.truncated for item in drawn), sum(item.difficult for item in drawn)
    assert 0.05 * len(drawn) < truncated < 0.6 * len(drawn)
    assert 0.01 * len(drawn) < difficult < 0.2 * len(drawn)


@pytest.mark.parametrize(("size", "label"), [(31, None), (0, None), (64, 0), (64, 11)])
def test_render_refuses_what_it_cannot_draw(size: int, label: int | None) -> None:
    with pytest.raises(ValueError, match="choose"):
        render_scene(np.random.default_rng(0), size, label)


def features(drawn: list[Scene], kind: str) -> np.ndarray:
    images = np.stack([scene.image for scene in drawn]).astype(np.float32) / 255
    if kind == "layout":  # mean color of 8 x 8 cells
        count, size = images.shape[:2]
        return images.reshape(count, 8, size // 8, 8, size // 8, 3).mean((2, 4)).reshape(count, -1)
    if kind == "color":  # joint histogram, 4 bins a channel
        bins = (images * 3.999).astype(int) @ np.array([16, 4, 1])
        return np.sqrt(np.stack([np.bincount(image.ravel(), minlength=64) for image in bins]))
    # Gradient strength by direction, in 4 x 4 cells, as in HOG (Dalal and Triggs, 2005).
    gray = images.mean(-1)
    dy, dx = np.gradient(gray, axis=(1, 2))
    strength, direction = np.hypot(dx, dy), (np.arctan2(dy, dx) % np.pi / np.pi * 8.999).astype(int)
    count, size = gray.shape[:2]
    votes = np.where(direction[..., None] == np.arange(9), strength[..., None], 0)
    cells = votes.reshape(count, 4, size // 4, 4, size // 4, 9).sum((2, 4)).reshape(count, -1)
    return np.sqrt(cells / cells.sum(1, keepdims=True))


def test_color_and_layout_hint_at_the_class_and_structure_tells_it() -> None:
    drawn = [render_scene(np.random.default_rng(i), 64, 1 + i % 10) for i in range(600)]
    labels = [scene.objects[0].label for scene in drawn]
    accuracy = {}
    for kind in ("layout", "color", "structure"):
        x = features(drawn, kind)
        x = (x - x.mean(0)) / (x.std(0) + 1e-6)
        votes = KNeighborsClassifier(20, metric="cosine", weights="distance").fit(x[:400], labels[:400])
        accuracy[kind] = votes.score(x[400:], labels[400:])
    # Chance is 0.10; its standard deviation over 200 scenes 0.02.
    assert accuracy["color"] < 0.40, accuracy
    assert accuracy["layout"] < 0.40, accuracy
    assert accuracy["structure"] > max(accuracy["color"], accuracy["layout"]) + 0.1, accuracy


# The folder


def test_files_agree_with_each_other(root: Path) -> None:
    classes = (root / "VOCdevkit/VOC2012/classes.txt").read_text().splitlines()
    assert classes == list(CLASSES)
    for name in names(root, "trainval"):
        with Image.open(root / f"VOCdevkit/VOC2012/JPEGImages/{name}.jpg") as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (SIZE, SIZE))
        instances, labels = mask(root, "SegmentationObject", name), mask(root, "SegmentationClass", name)
        assert instances.shape == labels.shape == (SIZE, SIZE)
        assert np.array_equal(instances == 0, labels == 0)

        annotation = ElementTree.parse(root / f"VOCdevkit/VOC2012/Annotations/{name}.xml").getroot()
        assert annotation.findtext("filename") == f"{name}.jpg"
        assert [annotation.findtext(f"size/{side}") for side in ("width", "height", "depth")] == ["48", "48", "3"]
        items = annotation.findall("object")
        assert set(np.unique(instances)) == set(range(len(items) + 1))
        for number, item in enumerate(items, start=1):
            rows, columns = np.nonzero(instances == number)
            box = [int(item.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
            assert box == [columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1]
            assert {classes[label - 1] for label in labels[rows, columns]} == {item.findtext("name")}
            assert item.findtext("truncated") in ("0", "1")
            assert item.findtext("difficult") in ("0", "1")
            assert item.findtext("pose") == "Unspecified"


def test_files_hold_the_scenes_of_the_seed(root: Path) -> None:
    scene = render_scene(np.random.default_rng((SEED, 1, 7)), SIZE, label=8)
    assert np.array_equal(mask(root, "SegmentationClass", "val_000007"), scene.class_mask)
    assert np.array_equal(mask(root, "SegmentationObject", "val_000007"), scene.instance_mask)
    with Image.open(root / "VOCdevkit/VOC2012/JPEGImages/val_000007.jpg") as picture:
        assert np.abs(np.array(picture, np.float32) - scene.image).mean() < 8


def test_masks_have_the_colors_of_voc(root: Path) -> None:
    with Image.open(root / "VOCdevkit/VOC2012/SegmentationClass/train_000000.png") as picture:
        palette = np.array(picture.getpalette()).reshape(-1, 3).tolist()
    # From the legend of the VOC 2012 development kit: background, aeroplane, bicycle, boat, person, monitor, void.
    published = {
        0: [0, 0, 0],
        1: [128, 0, 0],
        2: [0, 128, 0],
        4: [0, 0, 128],
        15: [192, 128, 128],
        20: [0, 64, 128],
        255: [224, 224, 192],
    }
    assert {index: palette[index] for index in published} == published


def test_lists_name_every_scene_once(root: Path) -> None:
    train, val = names(root, "train"), names(root, "val")
    assert (len(train), len(val)) == (TRAIN, VAL)
    assert not set(train) & set(val)
    assert names(root, "trainval") == train + val
    for split in ("train", "val", "trainval"):
        assert names(root, split, "Segmentation") == names(root, split)
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations"):
        stems = [path.stem for path in (root / "VOCdevkit/VOC2012" / folder).iterdir()]
        assert sorted(stems) == sorted(train + val)


def test_class_folders_follow_the_largest_visible_object(root: Path) -> None:
    for split in ("train", "val"):
        seen = []
        for path in (root / split).glob("*/*.jpg"):
            instances, labels = mask(root, "SegmentationObject", path.stem), mask(root, "SegmentationClass", path.stem)
            largest = max(np.unique(instances[instances > 0]), key=lambda number: np.sum(instances == number))
            assert path.parent.name == CLASSES[labels[instances == largest][0] - 1]
            assert path.resolve() == (root / f"VOCdevkit/VOC2012/JPEGImages/{path.name}").resolve()
            assert not Path(os.readlink(path)).is_absolute()
            seen.append(path)
        assert sorted(path.stem for path in seen) == names(root, split)
        frequency = Counter(path.parent.name for path in seen)
        assert set(frequency) == set(CLASSES)
        assert max(frequency.values()) - min(frequency.values()) <= 1


def test_bytes_do_not_depend_on_the_number_of_processes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = []

    def pool(workers: int, *options: Any) -> ProcessPoolExecutor:
        pools.append(workers)
        return ProcessPoolExecutor(workers, *options)

    monkeypatch.setattr(processes, "ProcessPoolExecutor", pool)
    write_scenes(tmp_path / "two", TRAIN, VAL, SIZE, SEED, workers=2)
    assert pools == [2]
    assert contents(tmp_path / "two") == contents(root)


def test_a_scene_does_not_depend_on_the_counts_but_on_the_seed(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / "fewer", train=12, val=2, size=SIZE, seed=SEED, workers=1)
    write_scenes(tmp_path / "other", train=12, val=2, size=SIZE, seed=SEED + 1, workers=1)
    full, fewer, other = contents(root), contents(tmp_path / "fewer"), contents(tmp_path / "other")
    pictures = [path for path in fewer if "VOCdevkit" in path and path.endswith((".jpg", ".png", ".xml"))]
    assert len(pictures) == 4 * 14
    assert all(fewer[path] == full[path] for path in pictures)
    assert not any(other[path] == full[path] for path in pictures if path.endswith(".jpg"))


def test_copies_where_there_are_no_symlinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("symbolic link privilege not held")

    monkeypatch.setattr(os, "symlink", refuse)
    write_scenes(tmp_path / "scenes", train=10, val=1, size=32, workers=1)
    copies = list((tmp_path / "scenes/train").glob("*/*.jpg"))
    assert len(copies) == 10
    for path in copies:
        assert not path.is_symlink()
        assert path.read_bytes() == (tmp_path / "scenes/VOCdevkit/VOC2012/JPEGImages" / path.name).read_bytes()


# Whole or not at all


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(
    stop: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = 0

    def interrupted(*arguments: object) -> Scene:
        nonlocal drawn
        drawn += 1
        if drawn == 8:
            raise stop
        return render_scene(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(dataset, "render_scene", interrupted)
    with pytest.raises(stop):
        write_scenes(tmp_path / "scenes", train=10, val=10, size=32, workers=1)
    assert drawn == 8
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command at work, with workers, in a session of its own."""
    command = [sys.executable, "-m", "skipless.datasets.scenes", "--out", str(tmp_path / "scenes")]
    command += ["--train", "100000", "--size", "32", "--workers", "2"]
    # A suite that was started in the background ignores Ctrl-C, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".scenes.*/VOCdevkit/VOC2012/JPEGImages/*.jpg")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def test_ctrl_c_leaves_nothing(writing: subprocess.Popen[str], tmp_path: Path) -> None:
    os.killpg(writing.pid, signal.SIGINT)
    _, messages = writing.communicate(timeout=60)
    assert writing.returncode == 130
    assert messages.splitlines()[-1].startswith("interrupted: ")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes(writing: subprocess.Popen[str], tmp_path: Path) -> None:
    """Its workers at once, its folder with the next write; not the folder of one that is at work."""
    (left,) = tmp_path.iterdir()
    write_scenes(tmp_path / "scenes", train=2, val=1, size=32, workers=1)
    assert left.exists()
    shutil.rmtree(tmp_path / "scenes")
    writing.kill()
    writing.communicate(timeout=60)  # ends when no worker holds its stderr any more
    assert left.exists()
    write_scenes(tmp_path / "scenes", train=2, val=1, size=32, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_the_same_settings_again_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scenes").mkdir()  # an empty folder is as good as none
    write_scenes(tmp_path / "scenes", train=10, val=1, size=32, workers=1)
    before = contents(tmp_path / "scenes")
    capsys.readouterr()

    monkeypatch.setattr(dataset, "render_scene", None)
    write_scenes(tmp_path / "scenes", train=10, val=1, size=32, workers=2)
    assert contents(tmp_path / "scenes") == before
    assert "already holds these scenes" in capsys.readouterr().err


def test_two_writers_of_the_same_folder_agree(tmp_path: Path) -> None:
    def write(_: int) -> None:
        write_scenes(tmp_path / "scenes", train=40, val=1, size=32, workers=1)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["scenes"]
    assert len(names(tmp_path / "scenes", "trainval")) == 41


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": 0}, "train is 0"),
        ({"val": -1}, "val is -1"),
        ({"size": 31}, "size is 31: choose 32 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_settings_out_of_range(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_scenes(tmp_path / "scenes", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("field", "value"), [("train", 97), ("val", 41), ("size", 50), ("seed", 4)])
def test_a_folder_of_other_settings_is_left_alone(field: str, value: int, root: Path) -> None:
    asked = {"train": TRAIN, "val": VAL, "size": SIZE, "seed": SEED}
    with pytest.raises(ValueError, match=rf"{root} already .* {field} {asked[field]} \(asked for: {value}\): delete"):
        write_scenes(root, **{**asked, field: value})


def test_a_folder_of_another_version_is_left_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "VERSION", dataset.VERSION + 1)
    with pytest.raises(ValueError, match="with version "):
        write_scenes(root, TRAIN, VAL, SIZE, SEED)


@pytest.mark.parametrize("record", ["", "{", "[]", '{"version": "one"}'])
def test_a_damaged_record_is_named(record: str, tmp_path: Path) -> None:
    (tmp_path / "scenes.json").write_text(record)
    with pytest.raises(ValueError, match=f"{tmp_path}.*delete"):
        write_scenes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["scenes.json"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "scenes"
    scenes.main(["--out", str(out), "--train", "12", "--val=3", "--size", "32", "--seed", "5", "--workers", "1"])
    printed = capsys.readouterr()
    assert printed.err == ""  # what is done in seconds leaves no lines of progress in a log
    assert printed.out.startswith(f"next: python ssl/pretrain.py --config configs/demo.yaml --data.path {out}/train ")
    settings = {"version": dataset.VERSION, "seed": 5, "train": 12, "val": 3, "size": 32}
    assert json.loads((out / "scenes.json").read_text()) == settings
    assert len(names(out, "trainval")) == 15


def test_command_line_refuses_with_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "size is 16" in refusal(scenes.main, ["--out", tmp_path / "new", "--size", "16"], capsys)
    assert "is a file" in refusal(scenes.main, ["--out", tmp_path / "thesis.tex"], capsys)
    assert "holds other files" in refusal(scenes.main, ["--out", tmp_path], capsys)
    assert contents(tmp_path) == {"thesis.tex": b"mine"}
