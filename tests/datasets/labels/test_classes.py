"""Images with one class each: every source gives what was put into it, and says what it cannot use."""

import hashlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import datasets as hf
from skipless.datasets.images import UnreadableImage
from skipless.datasets.labels.classes import (
    LabeledData,
    LabeledSet,
    arrays,
    cifar,
    class_folders,
    class_table,
    hugging_face,
    open_splits,
)

CLASSES = ("ant", "bee", "cat")


def pictures(count: int, seed: int = 0, side: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side + 2, 3), dtype=np.uint8)


def write_folders(root: Path, split: str, images: np.ndarray) -> None:
    """Image i in class i modulo 3, in a folder within the class folder."""
    for number, image in enumerate(images):
        path = root / split / CLASSES[number % 3] / "more" / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def write_zip(folder: Path, archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*.png")):
            file.write(path, path.relative_to(folder))


def by_class(images: np.ndarray) -> list[np.ndarray]:
    """In the order in which class folders give them."""
    return [image for label in range(3) for image in images[label::3]]


def assert_holds(found: LabeledSet, images: list[np.ndarray], labels: list[int]) -> None:
    assert len(found) == len(found.places) == len(images)
    assert found.labels.dtype == np.int64
    assert found.labels.tolist() == labels
    for index, image in enumerate(images):
        read = found.read(index)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, image)


def message(kind: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("packed", [False, True])
def test_class_folders_and_their_zip(tmp_path: Path, packed: bool) -> None:
    root, images = tmp_path / "insects", pictures(7)
    write_folders(root, "train", images)
    if packed:
        write_zip(root / "train", root / "train.zip")
        shutil.rmtree(root / "train")
    found = class_folders(root, "train")
    assert (found.name, found.split, found.classes) == ("insects", "train", CLASSES)
    assert_holds(found, by_class(images), [0, 0, 0, 1, 1, 2, 2])
    assert found.places[3].parts[-3:] == ("bee", "more", "01.png")
    assert (found.identity is None) == (not packed)
    assert packed or all(place.is_file() for place in found.places)


def test_identity_of_an_archive_changes_with_it(tmp_path: Path) -> None:
    write_folders(tmp_path, "train", pictures(6))
    identities = set()
    for when in (1_000_000_000, 1_000_000_001):
        write_zip(tmp_path / "train", tmp_path / "train.zip")
        os.utime(tmp_path / "train.zip", (when, when))
        shutil.move(tmp_path / "train", tmp_path / "aside")
        identities.add(class_folders(tmp_path, "train").identity)
        shutil.move(tmp_path / "aside", tmp_path / "train")
    assert len(identities) == 2
    assert None not in identities


def test_a_missing_split_names_what_is_there(tmp_path: Path) -> None:
    write_folders(tmp_path, "training", pictures(6))
    (tmp_path / "val.zip").touch()
    (tmp_path / "notes.txt").touch()
    text = message(FileNotFoundError, lambda: class_folders(tmp_path, "train"))
    assert text == f"{tmp_path}/train: no such split; {tmp_path} holds training, val.zip"
    text = message(FileNotFoundError, lambda: class_folders(tmp_path / "nowhere", "train"))
    assert text == f"{tmp_path}/nowhere: no such folder; it should hold train/CLASS/ or train.zip"
    for number in range(1000):
        (tmp_path / "imagenet" / f"n{number:03}").mkdir(parents=True)
    text = message(FileNotFoundError, lambda: class_folders(tmp_path / "imagenet", "train"))
    assert text.endswith("holds n000, n001, n002, n003, n004, n005, n006, n007, ...")


def test_images_without_class_folders_are_refused(tmp_path: Path) -> None:
    write_folders(tmp_path, "train", pictures(6))
    shutil.rmtree(tmp_path / "train" / "ant")
    shutil.rmtree(tmp_path / "train" / "bee")
    text = message(ValueError, lambda: class_folders(tmp_path, "train"))
    assert text == (
        f"{tmp_path}/train has no class folders: images must lie in {tmp_path}/train/CLASS/, in two classes or more"
    )


def test_unreadable_image_is_named(tmp_path: Path) -> None:
    write_folders(tmp_path, "train", pictures(6))
    (tmp_path / "train/bee/more/01.png").write_bytes(b"no image")
    with pytest.raises(UnreadableImage, match=r"train/bee/more/01\.png: "):
        class_folders(tmp_path, "train").read(2)


def write_table(root: Path, split: str, images: np.ndarray) -> None:
    """Image i in class i modulo 3, all in one folder."""
    (root / "pictures").mkdir(exist_ok=True, parents=True)
    rows = ["label,sure,image"]
    for number, image in enumerate(images):
        Image.fromarray(image).save(root / f"pictures/{split}{number}.png")
        rows.append(f"{CLASSES[number % 3]},yes,pictures/{split}{number}.png")
    (root / f"{split}.csv").write_text("\n".join(rows), encoding="utf-8-sig")


def test_tables(tmp_path: Path) -> None:
    root, images = tmp_path / "insects", {"train": pictures(7), "val": pictures(3, seed=1)}
    for split, of_split in images.items():
        write_table(root, split, of_split)
    for found in open_splits(LabeledData(str(root), "csv")):
        of_split = images[found.split]
        assert (found.name, found.classes) == ("insects", CLASSES)
        assert_holds(found, list(of_split), [number % 3 for number in range(len(of_split))])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,label\na.png,ant\n", "train.csv has no column image, but file, label: name the columns by --data.image"),
        ("image,label\na.png,ant\nb.png\n", "train.csv: image 2 has an empty label"),
        ("image,label\na.png,ant\nb.png,ant\n", "train.csv has 1 classes in its column label"),
        ("image,label\na.png,ant\nb.png,bee\n", "a.png: no such image (2 of 2 image files are missing)"),
        ("", "train.csv has no column image, but none"),
    ],
)
def test_tables_that_cannot_be_meant(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(words)):
        class_table(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"val\.csv: no such file; it should have the columns image and label"):
        class_table(tmp_path, "val")


@pytest.mark.parametrize("column", ["image", "label"])
def test_columns_of_what_has_none_are_refused(tmp_path: Path, column: str) -> None:
    with pytest.raises(ValueError, match=f"data.{column} has no effect on folder"):
        open_splits(LabeledData(str(tmp_path), **{column: "other"}))


def write_cifar(root: Path, classes: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A miniature in the authors' layout, whose checksums torchvision is told; the pixels of each split, as rows of
    1,024 red, 1,024 green and 1,024 blue values. Image i of a split has class i."""
    kind = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    key, names_key = ("labels", "label_names") if classes == 10 else ("fine_labels", "fine_label_names")
    folder = root / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(classes)

    def write(name: str, content: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    split_files = {"train": [name for name, _ in kind.train_list], "test": [name for name, _ in kind.test_list]}
    rows, sums = {}, {}
    for split, files in split_files.items():
        rows[split] = rng.integers(0, 256, (2 * len(files), 3072), dtype=np.uint8)
        for number, name in enumerate(files):
            own = slice(2 * number, 2 * number + 2)
            sums[name] = write(name, {"data": rows[split][own], key: [2 * number, 2 * number + 1]})
    names = [f"class {number}" for number in range(classes)]
    meta = kind.meta["filename"]
    sums[meta] = write(meta, {names_key: names})
    monkeypatch.setattr(kind, "train_list", [[name, sums[name]] for name in split_files["train"]])
    monkeypatch.setattr(kind, "test_list", [[name, sums[name]] for name in split_files["test"]])
    monkeypatch.setattr(kind, "meta", {"filename": meta, "key": names_key, "md5": sums[meta]})
    return rows


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_in_the_authors_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    rows = write_cifar(tmp_path, classes, monkeypatch)
    for split in ("train", "test"):
        found = cifar(tmp_path, split, classes)
        expected = [np.stack([row[c * 1024 :][:1024].reshape(32, 32) for c in range(3)], axis=2) for row in rows[split]]
        assert_holds(found, expected, list(range(len(expected))))
        assert (found.name, found.split) == (f"cifar{classes}", split)
        assert found.classes == tuple(f"class {number}" for number in range(classes))
    assert cifar(tmp_path, "train", classes).identity not in (None, found.identity)


@pytest.mark.parametrize("classes", [10, 100])
def test_altered_and_missing_cifar_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    write_cifar(tmp_path, classes, monkeypatch)
    (folder,) = tmp_path.iterdir()
    altered = sorted(folder.iterdir())[0]
    altered.write_bytes(altered.read_bytes() + b" ")
    for root in (tmp_path, tmp_path / "nowhere"):
        text = message(ValueError, lambda root=root: cifar(root, "train", classes))  # type: ignore[misc]
        assert text.startswith(f"{root / folder.name}: CIFAR-{classes}'s Python version is not there, or its files are")
    text = message(ValueError, lambda: cifar(tmp_path, "val", classes))
    assert text == f"CIFAR-{classes} has the splits train and test, and not val"


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_arrays_in_color(tmp_path: Path, dtype: type) -> None:
    images = pictures(4)
    np.savez(tmp_path / "val.npz", images=images, labels=np.array([2, 0, 2, 1], dtype))
    found = arrays(tmp_path, "val")
    assert (found.name, found.split, found.classes) == (tmp_path.name, "val", ("0", "1", "2"))
    assert_holds(found, list(images), [2, 0, 2, 1])
    assert str(found.places[3]) == f"{tmp_path}/val.npz[3]"


def test_gray_arrays_with_named_classes(tmp_path: Path) -> None:
    gray = pictures(2)[..., 0]
    np.savez_compressed(tmp_path / "val.npz", images=gray, labels=[1, 0], classes=["cat", "dog", "none of these"])
    found = arrays(tmp_path, "val")
    assert found.classes == ("cat", "dog", "none of these")
    assert_holds(found, [np.stack([image] * 3, axis=2) for image in gray], [1, 0])


def test_arrays_of_other_content_have_another_identity(tmp_path: Path) -> None:
    """The labels are no part of it: features do not depend on them."""
    images, changed = pictures(3), pictures(3)
    changed[2, 4, 5, 1] ^= 1
    for name, content, labels in (
        ("a", images, [0, 1, 2]),
        ("b", changed, [0, 1, 2]),
        ("c", images, [0, 0, 1]),
        ("d", images.reshape(3, 11, 9, 3), [0, 1, 2]),
    ):
        np.savez(tmp_path / f"{name}.npz", images=content, labels=labels)
    a, b, c, d = (arrays(tmp_path, name).identity for name in "abcd")
    assert a == c
    assert len({a, b, d}) == 3


GOOD = {"images": pictures(3), "labels": np.array([0, 1, 2])}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": None}, "lacks the array images"),
        ({"labels": None}, "lacks the array labels"),
        ({"images": GOOD["images"] / 255}, "images is float64 [3, 9, 11, 3], and must be uint8 [N, H, W, 3]"),
        ({"images": GOOD["images"][..., 0] / 255}, "images is float64 [3, 9, 11], and must be uint8"),
        ({"images": GOOD["images"][..., :2]}, "images is uint8 [3, 9, 11, 2]"),
        ({"images": GOOD["images"].reshape(3, -1)}, "images is uint8 [3, 297]"),
        ({"images": GOOD["images"][:0], "labels": GOOD["labels"][:0]}, "images is uint8 [0, 9, 11, 3]"),
        ({"labels": [0, 1]}, "labels is int64 [2], and must be integers from 0, one for each of 3 images"),
        ({"labels": [[0], [1], [2]]}, "labels is int64 [3, 1]"),
        ({"labels": [0.0, 1.0, 2.0]}, "labels is float64 [3]"),
        ({"labels": [0, -1, 2]}, "must be integers from 0"),
        ({"labels": ["0", "1", "2"]}, "labels is <U1 [3]"),
        ({"classes": ["one", "two"]}, "labels go up to 2, and classes names 2"),
        ({"labels": np.array([0, 1, None])}, "damaged, or no .npz file of plain arrays"),
        ({"images": np.array([GOOD["images"][0], None, None], object)}, "damaged, or no .npz file of plain arrays"),
    ],
)
def test_arrays_that_cannot_be_meant(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    content = {name: value for name, value in (GOOD | change).items() if value is not None}
    np.savez(tmp_path / "val.npz", **content)
    text = message(ValueError, lambda: arrays(tmp_path, "val"))
    assert text.startswith(str(tmp_path / "val.npz"))
    assert words in text


def test_a_pickle_in_an_npz_file_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    np.savez(tmp_path / "val.npz", images=np.array([Malicious()], object), labels=[0])
    message(ValueError, lambda: arrays(tmp_path, "val"))
    assert not (tmp_path / "run").exists()


def test_missing_and_damaged_files_of_arrays(tmp_path: Path) -> None:
    assert "val.npz: no such file" in message(FileNotFoundError, lambda: arrays(tmp_path, "val"))
    np.savez(tmp_path / "val.npz", **GOOD)
    whole = (tmp_path / "val.npz").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no archive"):
        (tmp_path / "val.npz").write_bytes(content)
        assert "val.npz: damaged, or no .npz" in message(ValueError, lambda: arrays(tmp_path, "val"))
    with open(tmp_path / "val.npz", "wb") as file:
        np.save(file, GOOD["images"])
    assert "val.npz: damaged, or no .npz" in message(ValueError, lambda: arrays(tmp_path, "val"))


@pytest.fixture(params=["folder", "csv", "zip", "cifar", "arrays", "huggingface"])
def labeled(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabeledSet:
    """Six images or more."""
    images = pictures(6)
    if request.param == "cifar":
        write_cifar(tmp_path, 10, monkeypatch)
        return cifar(tmp_path, "train", 10)
    if request.param == "arrays":
        np.savez(tmp_path / "train.npz", images=images, labels=np.arange(6) % 3)
        return arrays(tmp_path, "train")
    if request.param == "huggingface":
        features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(CLASSES))})
        columns = {"image": [*map(Image.fromarray, images)], "label": [0, 1, 2, 0, 1, 2]}
        hf.DatasetDict(train=hf.Dataset.from_dict(columns, features)).save_to_disk(str(tmp_path / "saved"))
        return hugging_face(str(tmp_path / "saved"), "train")
    if request.param == "csv":
        write_table(tmp_path, "train", images)
        return class_table(tmp_path, "train")
    write_folders(tmp_path, "train", images)
    if request.param == "zip":
        write_zip(tmp_path / "train", tmp_path / "train.zip")
        shutil.rmtree(tmp_path / "train")
    return class_folders(tmp_path, "train")


class Reads(Dataset):
    def __init__(self, images: LabeledSet):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images.read(index)


def test_other_processes_can_read(labeled: LabeledSet) -> None:
    """By a copy that was pickled, too, as on systems where processes are not forked; also a part of a set."""
    expected = [labeled.read(row) for row in (5, 0, 3)]
    copy = pickle.loads(pickle.dumps(labeled.take(np.array([5, 0, 3]))))
    loader = DataLoader(Reads(copy), batch_size=None, num_workers=2, collate_fn=None)
    for found in ([copy.read(row) for row in range(3)], list(loader)):
        assert len(found) == 3
        for image, own in zip(found, expected, strict=True):
            np.testing.assert_array_equal(image, own)
    assert copy.labels.tolist() == [labeled.labels[row] for row in (5, 0, 3)]


def test_a_part_of_a_set_is_another_set(labeled: LabeledSet) -> None:
    some, others = labeled.take(np.array([4, 1])), labeled.take(np.array([1, 4]))
    assert len(some) == 2
    assert [some.places[0], some.places[1]] == [labeled.places[4], labeled.places[1]]
    assert (some.name, some.split, some.classes) == (labeled.name, labeled.split, labeled.classes)
    np.testing.assert_array_equal(some.take(np.array([1])).read(0), labeled.read(1))
    identities = [labeled.identity, some.identity, others.identity, some.take(np.array([1])).identity]
    if labeled.identity is None:
        assert identities == [None] * 4
    else:
        assert len({*identities, None}) == 5
