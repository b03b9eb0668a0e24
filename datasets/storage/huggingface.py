"""Data sets of Hugging Face's `datasets`: a folder that save_to_disk wrote, or a name on the hub."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipless.datasets.storage.remote import reason_of


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one split."""

    split: str
    images: Any
    """The column of images alone, a `datasets.Dataset` that leaves them undecoded."""
    column: str
    """Its name."""
    labels: np.ndarray | None
    """int64 [N], position in `classes`; None where no class is known of some row."""
    classes: tuple[str, ...]
    fingerprint: str
    """Tells the data from others."""

    def read_bytes(self, row: int) -> bytes:
        """The image's file. Raises OSError, and ValueError for a row without one."""
        stored = self.images[row][self.column] or {"bytes": None, "path": None}
        if stored["bytes"] is not None:
            return bytes(stored["bytes"])
        if stored["path"] is None:
            raise ValueError("there is no image in this row")
        return Path(stored["path"]).read_bytes()


def open_table(
    name: str, split: str = "", image: str | None = None, label: str | None = None, origin: str = ""
) -> Table:
    """Images of a data set with their classes.

    Args:
        name: a folder, or a name on the hub.
        split: by default train, or all that the folder holds.
        image: column of the feature Image; by default the first.
        label: column of the feature ClassLabel, or of integers from 0. By default the first ClassLabel, if there is
            one; then rows may lack their class.
        origin: what was opened, for messages.

    Raises ValueError where the package is missing, or the data set, the split or a column, and for empty data.
    """
    origin = origin or name
    try:
        datasets: Any = importlib.import_module("datasets")
        load_dataset, load_from_disk = datasets.load_dataset, datasets.load_from_disk
    except (ImportError, AttributeError):  # without it, a folder of this name can take its place
        raise ValueError(f"{origin}: Hugging Face data need the package datasets: pip install datasets") from None
    folder = Path(name).expanduser()
    try:
        data: Any = load_from_disk(str(folder)) if folder.is_dir() else load_dataset(name, split=split or "train")
    except Exception as error:  # unknown name, no network, other files: each has a class of its own
        raise ValueError(f"{origin}: datasets cannot load this ({reason_of(error)})") from None
    if isinstance(data, dict):
        split = split or "train"
        if split not in data:
            raise ValueError(f"{origin} has no split {split}, only {', '.join(data)}")
        data = data[split]
    elif folder.is_dir() and split:
        raise ValueError(f"{origin} holds one Dataset without splits, so {split} cannot be told from others")
    if not len(data):
        raise ValueError(f"{origin}: no image found, since it has no rows")
    image = _column(data, image, datasets.Image, origin)
    if image is None:
        raise ValueError(f"{origin} has no column of the feature Image, only {', '.join(data.features)}")
    labels, classes = _classes(data, label, datasets.ClassLabel, origin)
    # Undecoded: our reader knows what to do with orientation, transparency and damage.
    images = data.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return Table(split or str(data.split or "train"), images, image, labels, classes, data._fingerprint)


def _column(data: Any, name: str | None, kind: type, origin: str) -> str | None:
    """The named column, or the first of this kind; None where there is none."""
    if name is None:
        return next((column for column, feature in data.features.items() if isinstance(feature, kind)), None)
    if name not in data.features:
        raise ValueError(f"{origin} has no column {name}, only {', '.join(data.features)}")
    if not isinstance(data.features[name], kind):
        raise ValueError(f"{origin}: {name} holds {data.features[name]}, and must be of the feature {kind.__name__}")
    return name


def _classes(data: Any, name: str | None, kind: type, origin: str) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels and names of classes; None and () where no column was asked for and none is complete."""
    column = _column(data, name, object if name else kind, origin)
    if column is None:
        return None, ()
    labels = np.asarray(data[column][:])
    if name is None:
        # A missing label becomes NaN; the hub gives -1 to those that are kept secret.
        if not (labels.astype(np.float64) >= 0).all():
            return None, ()
    elif labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise ValueError(f"{origin}: {name} holds {data.features[column]}, and not one class an image, numbered from 0")
    names = getattr(data.features[column], "names", None) or range(int(labels.max()) + 1)
    return labels.astype(np.int64), tuple(map(str, names))
