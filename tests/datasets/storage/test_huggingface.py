"""Data sets of Hugging Face, from disk and as the hub would give them, as plain images and as classes."""

import pickle
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import datasets as hf
from skipless.datasets.images import UnreadableImage, open_images
from skipless.datasets.labels.classes import hugging_face

CLASSES = ("ant", "bee", "cat")
FEATURES = hf.Features(
    {
        "text": hf.Value("string"),
        "photo": hf.Image(),
        "kind": hf.ClassLabel(names=list(CLASSES)),
        "other": hf.Value("int64"),
    }
)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 9, 11, 3), dtype=np.uint8)


def make(photos: list[Any], kinds: list[int], split: str = "train") -> Any:
    columns = {"text": ["a"] * len(kinds), "photo": photos, "kind": kinds, "other": list(range(len(kinds)))}
    return hf.Dataset.from_dict(columns, features=FEATURES, split=hf.NamedSplit(split))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with three images of train, one of which was a file, and one of test, whose class is kept secret."""
    hf.disable_progress_bars()
    images = pictures(3)
    Image.fromarray(images[2]).save(tmp_path / "file.png")
    train = make([*map(Image.fromarray, images[:2]), str(tmp_path / "file.png")], [2, 0, 1])
    test = make([Image.fromarray(images[0])], [-1], "test")
    hf.DatasetDict(train=train, test=test).save_to_disk(str(tmp_path / "saved"))
    train.save_to_disk(str(tmp_path / "one"))
    return tmp_path / "saved"


def test_images_on_disk(saved: Path) -> None:
    for place in (saved, f"hf:{saved}", f"hf:{saved}:train", saved.with_name("one")):
        images = open_images(place)
        assert list(images.names) == ["train[0]", "train[1]", "train[2]"]
        assert images.classes == CLASSES
        assert images.labels is not None
        assert images.labels.tolist() == [2, 0, 1]
        for source in (images, pickle.loads(pickle.dumps(images))):
            np.testing.assert_array_equal([source.read(i) for i in range(3)], pictures(3))
    secret = open_images(f"hf:{saved}:test")
    assert (len(secret), secret.labels, secret.classes) == (1, None, ())


def test_classes_on_disk(saved: Path) -> None:
    train = hugging_face(str(saved), "train", "photo", "kind")
    assert (train.name, train.split, train.classes) == ("saved", "train", CLASSES)
    assert train.labels.tolist() == [2, 0, 1]
    np.testing.assert_array_equal([train.read(i) for i in range(3)], pictures(3))
    assert [str(place) for place in train.places] == [f"{saved}/train[{row}]" for row in range(3)]
    assert hugging_face(str(saved), "train", "photo", "other").classes == ("0", "1", "2")  # integers without names


def test_other_images_in_the_same_place_have_another_identity(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity(seed: int, split: str = "train") -> str | None:
        data = make([*map(Image.fromarray, pictures(2, seed))], [0, 1])
        monkeypatch.setattr(hf, "load_dataset", lambda name, split: data)
        return hugging_face("someone/insects", split, "photo", "kind").identity

    assert identity(0) == identity(0)
    assert len({identity(0), identity(1), identity(0, "test"), None}) == 4


def test_names_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that stayed files, one of them turned by its orientation, and some that are not there."""
    image = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored as the left side is the top
    Image.fromarray(np.rot90(image)).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [str(tmp_path / name) for name in ("turned.png", "broken.png", "gone.png")]
    asked: list[tuple[str, str]] = []
    data = make([*paths, None], [0, 1, 2, 0])
    monkeypatch.setattr(hf, "load_dataset", lambda name, split: asked.append((name, split)) or data)
    open_images("hf:someone/insects")
    sources = [open_images("hf:someone/insects:test[:9]"), hugging_face("someone/insects", "val", "photo", "kind")]
    assert asked == [("someone/insects", split) for split in ("train", "test[:9]", "val")]
    for source, place in zip(sources, ("hf:someone/insects:test[:9]/test[:9]", "someone/insects/val"), strict=True):
        np.testing.assert_array_equal(source.read(0), image)
        for row, words in ((1, "the content is not that of"), (2, "No such file"), (3, "no image in this row")):
            with pytest.raises(UnreadableImage, match=words) as caught:
                source.read(row)
            assert caught.value.path == f"{place}[{row}]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("val", "photo", "kind"), "has no split val, only train, test"),
        (("train", "image", "kind"), "has no column image, only text, photo, kind, other"),
        (("train", "photo", "label"), "has no column label, only text, photo, kind, other"),
        (("train", "kind", "kind"), "kind holds ClassLabel"),
        (("train", "other", "kind"), "and must be of the feature Image"),
        (("train", "photo", "photo"), "photo holds Image"),
        (("train", "photo", "text"), "and not one class an image, numbered from 0"),
        (("test", "photo", "kind"), "and not one class an image, numbered from 0"),  # -1, as it is kept secret
    ],
)
def test_wrong_splits_and_columns(saved: Path, arguments: tuple[str, str, str], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^{saved}.*{re.escape(words)}"):
        hugging_face(str(saved), *arguments)


def test_one_split_alone_is_not_taken_for_all(saved: Path) -> None:
    """Training images would otherwise be classified by themselves."""
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match="one holds one Dataset without splits"):
            hugging_face(str(saved.with_name("one")), split, "photo", "kind")
    with pytest.raises(ValueError, match="one:train holds one Dataset without splits, so train cannot"):
        open_images(f"hf:{saved.with_name('one')}:train")
    with pytest.raises(ValueError, match=r"saved:val has no split val, only train, test$"):
        open_images(f"hf:{saved}:val")


def test_data_that_do_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "text"))
    with pytest.raises(ValueError, match=r"text has no column of the feature Image, only text$"):
        open_images(tmp_path / "text")
    with pytest.raises(ValueError, match="datasets cannot load this"):
        hugging_face(str(tmp_path), "train")
    monkeypatch.setattr(hf, "load_dataset", lambda *_, **__: make([], []))
    with pytest.raises(ValueError, match=r"hf:a/empty: no image found"):
        open_images("hf:a/empty")

    def offline(name: str, split: str) -> None:
        raise ConnectionError("the hub cannot be reached\nand more")

    monkeypatch.setattr(hf, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"^hf:a/b: datasets cannot load this \(the hub cannot be reached\)$"):
        open_images("hf:a/b")


@pytest.mark.parametrize("there", [None, types.ModuleType("datasets")])
def test_without_the_package_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, there: types.ModuleType | None
) -> None:
    """Also where this project's own folder is found in its place, an empty namespace."""
    monkeypatch.setitem(sys.modules, "datasets", there)
    words = "Hugging Face data need the package datasets: pip install datasets"
    with pytest.raises(ValueError, match=rf"^hf:a/b: {words}$"):
        open_images("hf:a/b")
    with pytest.raises(ValueError, match=rf"^a/b: {words}$"):
        hugging_face("a/b", "train")
