"""Images with one class each: class folders, tables in .csv files, CIFAR, arrays in .npz files, Hugging Face.

train = class_folders("imagenette", "train")
train.read(0)  # uint8 [H, W, 3]
train.classes[train.labels[0]]
"""

import csv
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from skipless.datasets.images import from_table, open_images, read_image
from skipless.datasets.labels.masks import require_files
from skipless.datasets.storage.huggingface import open_table

SetName = Literal["folder", "csv", "cifar10", "cifar100", "arrays", "huggingface"]


@dataclass(frozen=True, eq=False)
class LabeledSet:
    """N images, each of one class. Can be pickled, so that worker processes can read."""

    name: str
    """Of the data set, for tables."""
    split: str
    labels: np.ndarray
    """int64 [N], 0..C-1."""
    classes: tuple[str, ...]
    """[C]"""
    places: Sequence[Path]
    """[N], where each image lies, for messages. Files that exist, unless there is an `identity`."""
    read: Callable[[int], np.ndarray]
    """Image i as uint8 [H, W, 3] RGB. Raises UnreadableImage."""
    identity: str | None = None
    """Tells the data from others, where images are not files of their own."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "LabeledSet":
        """Some of the images, in the order of `rows`."""
        identity = self.identity and _sha256(self.identity, rows.tolist())
        places = [self.places[row] for row in rows.tolist()]
        read = partial(_read_row, self.read, rows)
        return replace(self, labels=self.labels[rows], places=places, read=read, identity=identity)


def _read_row(read: Callable[[int], np.ndarray], rows: np.ndarray, index: int) -> np.ndarray:
    return read(int(rows[index]))


@dataclass
class LabeledData:
    """What is learned from and what is classified."""

    root: str
    """folder: the folder that holds train/CLASS/*.jpg and val/CLASS/*.jpg (or train.zip, val.zip). csv: the one that
    holds train.csv and val.csv, whose columns are image (a file, from that folder on) and label. cifar10, cifar100: the
    one that holds the authors' Python version. arrays: the one that holds train.npz and val.npz, with the arrays images
    (uint8 [N, H, W, 3]) and labels. huggingface: a folder that save_to_disk wrote, or a name on the hub."""
    name: SetName = "folder"
    """Where the data come from."""
    split: str | None = None
    """Split that is classified: by default val, for CIFAR test, for huggingface validation."""
    train_split: str = "train"
    """Split that is learned from."""
    image: str = "image"
    """huggingface, csv: the column of images."""
    label: str = "label"
    """huggingface, csv: the column of classes."""


def open_splits(data: LabeledData) -> tuple[LabeledSet, LabeledSet]:
    """The split that is learned from, and the one that is classified.

    Raises:
        ValueError, FileNotFoundError: data that are not there, or two splits of different classes.
    """

    def opened(part: str) -> LabeledSet:
        if data.name == "folder":
            return class_folders(data.root, part)
        if data.name == "csv":
            return class_table(data.root, part, data.image, data.label)
        if data.name == "arrays":
            return arrays(data.root, part)
        if data.name == "huggingface":
            return hugging_face(data.root, part, data.image, data.label)
        return cifar(data.root, part, int(data.name.removeprefix("cifar")))

    columns = {"image": data.image, "label": data.label}
    if data.name not in ("csv", "huggingface") and (idle := [name for name in columns if columns[name] != name]):
        raise ValueError(f"data.{idle[0]} has no effect on {data.name}: it is a column of csv or huggingface")
    default = {"cifar10": "test", "cifar100": "test", "huggingface": "validation"}.get(data.name, "val")
    train, val = opened(data.train_split), opened(data.split or default)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(
            f"{train.name}: {train.split} and {val.split} must have the same classes, and "
            f"{', '.join(odd[:4]) or 'their order'} is not in both"
        )
    return train, val


def class_folders(root: str | Path, split: str) -> LabeledSet:
    """ROOT/SPLIT/CLASS/any/depth.jpg, as ImageNet is laid out; or ROOT/SPLIT.zip with the class folders in it.

    Raises FileNotFoundError, naming the splits that are there; ValueError for a split without class folders.
    """
    root = Path(root).expanduser()
    path = next((p for p in (root / split, root / f"{split}.zip") if p.exists()), None)
    if path is None:
        if not root.is_dir():
            raise FileNotFoundError(f"{root}: no such folder; it should hold {split}/CLASS/ or {split}.zip")
        others = sorted(p.name for p in root.iterdir() if p.is_dir() or p.suffix == ".zip")
        named = ", ".join(others if len(others) <= 8 else [*others[:8], "..."]) or "no folders"
        raise FileNotFoundError(f"{root / split}: no such split; {root} holds {named}")
    images = open_images(path)
    if images.labels is None:
        raise ValueError(f"{path} has no class folders: images must lie in {path}/CLASS/, in two classes or more")
    places = [images.root / name for name in images.names]
    if images.members is None:
        return LabeledSet(root.resolve().name, split, images.labels, images.classes, places, images.read)
    status = path.stat()
    identity = _sha256(path.resolve(), status.st_size, status.st_mtime_ns)
    return LabeledSet(root.resolve().name, split, images.labels, images.classes, places, images.read, identity)


def class_table(root: str | Path, split: str, image: str = "image", label: str = "label") -> LabeledSet:
    """ROOT/SPLIT.csv: a line of column names, then an image and its class a line; other columns do not matter.

    Args:
        image, label: names of the columns; of files, from ROOT on, and of classes, which are sorted.

    Raises FileNotFoundError for a missing table or image, ValueError for a table without these columns, an empty cell,
    or fewer than two classes.
    """
    root = Path(root).expanduser()
    path = root / f"{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should have the columns {image} and {label}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read as a table ({error})") from error
    for column in (image, label):
        if column not in columns:
            raise ValueError(
                f"{path} has no column {column}, but {', '.join(columns) or 'none'}: name the columns by "
                "--data.image and --data.label"
            )
    empty = next((number for number, row in enumerate(rows, 1) if not (row[image] and row[label])), None)
    if empty:
        raise ValueError(f"{path}: image {empty} has an empty {label if rows[empty - 1][image] else image}; fill it in")
    classes = sorted({row[label] for row in rows})
    if len(classes) < 2:
        raise ValueError(f"{path} has {len(classes)} classes in its column {label}; there must be two or more")
    labels = np.array([classes.index(row[label]) for row in rows], np.int64)
    places = [root / row[image] for row in rows]
    require_files(places, "image")
    return LabeledSet(root.resolve().name, split, labels, tuple(classes), places, partial(_read_place, places))


def cifar(root: str | Path, split: str, classes: int) -> LabeledSet:
    """CIFAR-10 or CIFAR-100 in its Python version, `cifar-10-batches-py` or `cifar-100-python` in ROOT.

    The files are pickles: torchvision opens them after it has compared their checksums with the authors'.

    Raises ValueError for another split than train and test, and for missing or altered files.
    """
    from torchvision import datasets as torchvision_datasets

    if split not in ("train", "test"):
        raise ValueError(f"CIFAR-{classes} has the splits train and test, and not {split}")
    kind = torchvision_datasets.CIFAR10 if classes == 10 else torchvision_datasets.CIFAR100
    folder = Path(root).expanduser()
    try:
        data = kind(str(folder), train=split == "train")
    except RuntimeError:
        raise ValueError(
            f"{folder / kind.base_folder}: CIFAR-{classes}'s Python version is not there, or its files are altered; "
            "unpack the authors' archive in this folder"
        ) from None
    name = f"cifar{classes}"
    return _from_arrays(name, split, data.data, np.asarray(data.targets), tuple(data.classes), folder / name)


def arrays(root: str | Path, split: str) -> LabeledSet:
    """ROOT/SPLIT.npz with the arrays `images`, uint8 [N, H, W, 3] or gray [N, H, W], `labels`, integers [N], and, if
    wanted, `classes` with their names.

    Raises FileNotFoundError for a missing file, ValueError for one that holds something else.
    """
    path = Path(root).expanduser() / f"{split}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; it should hold the arrays images and labels")
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in ("images", "labels", "classes") if name in file}
    except Exception as error:  # zipfile's, zlib's and numpy's own
        raise ValueError(f"{path}: damaged, or no .npz file of plain arrays ({error})") from None
    if "images" not in content or "labels" not in content:
        raise ValueError(f"{path} lacks the array {'labels' if 'images' in content else 'images'}")
    images, labels = content["images"], content["labels"]
    gray = images.ndim == 3
    if images.dtype != np.uint8 or not (gray or (images.ndim == 4 and images.shape[-1] == 3)) or 0 in images.shape:
        raise ValueError(
            f"{path}: images is {images.dtype} {list(images.shape)}, and must be uint8 [N, H, W, 3] or [N, H, W]"
        )
    if gray:
        images = np.repeat(images[..., None], 3, axis=-1)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(
            f"{path}: labels is {labels.dtype} {list(labels.shape)}, and must be integers from 0, one for each of "
            f"{len(images)} images"
        )
    count = int(labels.max()) + 1
    names = tuple(map(str, content["classes"])) if "classes" in content else tuple(map(str, range(count)))
    if len(names) < count:
        raise ValueError(f"{path}: labels go up to {count - 1}, and classes names {len(names)}")
    return _from_arrays(Path(root).expanduser().resolve().name, split, images, labels, names, path)


def hugging_face(root: str, split: str, image: str = "image", label: str = "label") -> LabeledSet:
    """A data set of Hugging Face's `datasets`: a folder that `DatasetDict.save_to_disk` wrote, or a name on the hub.

    Args:
        image, label: its columns; `image` of the feature Image, `label` of ClassLabel or integers.

    Raises ValueError where the package is missing, or the data set, the split or a column.
    """
    table = open_table(root, split, image, label)
    source = from_table(root, table, root)
    assert source.labels is not None  # since a column was named
    places = [Path(source.place(row)) for row in range(len(source))]
    identity = _sha256(root, split, table.fingerprint)
    name = Path(root).expanduser().resolve().name
    return LabeledSet(name, split, source.labels, source.classes, places, source.read, identity)


def _read_place(places: Sequence[Path], index: int) -> np.ndarray:
    return read_image(places[index])


def _from_arrays(
    name: str, split: str, images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], path: Path
) -> LabeledSet:
    places = [Path(f"{path}[{row}]") for row in range(len(images))]
    identity = _sha256(images.shape, hashlib.sha256(images.tobytes()).hexdigest())
    return LabeledSet(name, split, labels.astype(np.int64), classes, places, images.__getitem__, identity)


def _sha256(*parts: Any) -> str:
    return hashlib.sha256(repr([str(part) for part in parts]).encode()).hexdigest()
