"""Images with the depth of every pixel: NYUv2's labeled part, or folders of one's own.

test = nyuv2("data/NYUv2", "test")
test.read_image(0)  # uint8 [H, W, 3]
test.read_depth(0)  # float32 [H, W] in meters, NaN where it is not known
"""

import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import loadmat

from skipless.datasets.images import UnreadableImage
from skipless.datasets.labels.masks import list_folder, read_stored
from skipless.datasets.storage.folder import read_file
from skipless.datasets.storage.names import EXTENSIONS

MILLIMETERS = 1000.0  # in a meter


@dataclass(frozen=True, eq=False)
class DepthSet:
    """N images with their depths. Holds no open file: it can be pickled and forked."""

    name: str
    split: str
    names: tuple[str, ...]
    files: tuple[Path, ...]
    """All that images and depths are read from."""
    stored_image: Callable[[int], np.ndarray]
    """uint8 [H, W, 3] by its place among all. Raises UnreadableImage, a ValueError, as does `stored_depth`."""
    stored_depth: Callable[[int], np.ndarray]
    """Likewise [H, W] in meters."""
    rows: tuple[int, ...]
    """[N] their places in what is read."""
    crop: tuple[int, int, int, int] | None = None
    """Rows from and to, columns from and to, that are scored; None for all."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, kept: Sequence[int]) -> "DepthSet":
        """Some of the images, by their places in this set."""
        names, rows = tuple(self.names[row] for row in kept), tuple(self.rows[row] for row in kept)
        return replace(self, names=names, rows=rows)

    def read_image(self, index: int) -> np.ndarray:
        """uint8 [H, W, 3]. Raises UnreadableImage, a ValueError."""
        return self.stored_image(self.rows[index])

    def read_depth(self, index: int) -> np.ndarray:
        """float32 [H, W] in meters; NaN where it is not known, which is what is not finite or not above 0. Raises
        UnreadableImage."""
        depth = self.stored_depth(self.rows[index]).astype(np.float32)
        return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`read_image` and `read_depth`. Raises UnreadableImage, a ValueError, also where the two differ in size."""
        image, depth = self.read_image(index), self.read_depth(index)
        if image.shape[:2] != depth.shape:
            raise UnreadableImage(
                self.names[index],
                f"the image has {image.shape[1]} x {image.shape[0]} pixels and its depth {depth.shape[1]} x "
                f"{depth.shape[0]}; both must be of one size",
            )
        return image, depth


def nyuv2(root: str | Path, split: str = "test") -> DepthSet:
    """train (795 images) or test (654) of NYUv2: nyu_depth_v2_labeled.mat and splits.mat in `root`.

    Depths are the raw ones, with holes, as they are usually compared (BTS, arXiv 1907.10326); the crop is Eigen's. The
    white frame of the images is blackened, as there.

    Raises FileNotFoundError for a missing file, ValueError for a damaged one, for another split, or without h5py.
    """
    root = Path(root).expanduser()
    data, lists = root / "nyu_depth_v2_labeled.mat", root / "splits.mat"
    for path in (data, lists):
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; NYUv2 is nyu_depth_v2_labeled.mat and splits.mat")
    if split not in ("train", "test"):
        raise ValueError(f"NYUv2 has no split {split}; choose train or test")
    rows = split_rows(lists, split)
    try:
        shapes = _opened(data, lambda file: {name: file[name].shape for name in ("images", "rawDepths")})
    except Exception as error:  # h5py raises what its parsers raise
        raise ValueError(f"{data}: cannot be read ({str(error) or type(error).__name__})") from None
    count = shapes["images"][0]
    if shapes["rawDepths"] != (count, *shapes["images"][2:]) or not rows or not 0 <= min(rows) <= max(rows) < count:
        raise ValueError(f"{data}: images, rawDepths and {lists.name} do not belong together: {shapes}")
    names = tuple(f"{row + 1:04}" for row in rows)
    image, depth = partial(_nyu_image, data), partial(_nyu_depth, data)
    return DepthSet("nyuv2", split, names, (data, lists), image, depth, rows, (45, 471, 41, 601))


def split_rows(lists: Path, split: str) -> tuple[int, ...]:
    """Which of NYUv2's images belong to a split, from 0, as splits.mat says. Raises ValueError for a damaged file."""
    try:
        return tuple(int(number) - 1 for number in loadmat(lists)[f"{split}Ndxs"].ravel())
    except Exception as error:  # scipy raises what its parsers raise
        raise ValueError(f"{lists}: cannot be read as NYUv2's splits ({str(error) or type(error).__name__})") from None


def depth_folder(root: str | Path, split: str = "val") -> DepthSet:
    """Images and depths of one's own: images/NAME.jpg (or another format), and depth/NAME.png (16-bit gray, in
    millimeters) or depth/NAME.npy ([H, W] in meters), in `root`, or in its folders train and val. Without these, every
    fourth image in the order of names is of val, and the others are of train.

    Raises FileNotFoundError for a missing folder or depth, ValueError for another split or too few images.
    """
    root = Path(root).expanduser()
    place = root / split if (root / split / "images").is_dir() else root
    names = sorted(name for name in list_folder(place / "images") if name.lower().endswith(EXTENSIONS))
    if not names:
        raise FileNotFoundError(f"{place / 'images'}: no images there; give a folder that holds images/ and depth/")
    if place == root:
        if split not in ("train", "val"):
            raise ValueError(f"{root} has no split {split}; without folders of splits, give train or val")
        names = [name for row, name in enumerate(names) if (row % 4 == 3) == (split == "val")]
    there = list_folder(place / "depth")
    images, depths = [place / "images" / name for name in names], []
    for picture in images:
        found = [ending for ending in (".png", ".npy") if picture.stem + ending in there]
        if not found:
            raise FileNotFoundError(f"{place / 'depth' / picture.stem}.png: no such depth, nor one that ends in .npy")
        depths.append(place / "depth" / (picture.stem + found[0]))
    if not images:
        raise ValueError(f"{root / 'images'}: too few images; every fourth is of val")
    image, depth = partial(_of_file, read_stored, images), partial(_of_file, read_depth_file, depths)
    shown, files, rows = tuple(map(str, images)), (*images, *depths), tuple(range(len(images)))
    return DepthSet(root.resolve().name, split, shown, files, image, depth, rows)


def read_depth_file(path: Path) -> np.ndarray:
    """Depth in meters, [H, W], of a 16-bit gray PNG in millimeters or a .npy in meters. Raises UnreadableImage."""
    try:
        data = read_file(path)
        if path.suffix == ".npy":
            depth = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
                if not opened.mode.startswith("I"):
                    raise ValueError(f"its pixels are {opened.mode}; depth must be 16-bit gray, in millimeters")
                depth = np.array(opened) / MILLIMETERS
    except Exception as error:  # Pillow raises what its parsers raise
        raise UnreadableImage(path, str(error) or type(error).__name__) from error
    if depth.ndim != 2 or depth.dtype.kind not in "fiu" or not depth.size:
        raise UnreadableImage(path, f"holds {depth.dtype} {list(depth.shape)}; depth must be numbers [H, W]")
    return depth


def _of_file(read: Callable[[Path], np.ndarray], files: list[Path], index: int) -> np.ndarray:
    return read(files[index])


def _nyu_image(data: Path, row: int) -> np.ndarray:
    stored = _opened(data, lambda file: np.array(file["images"][row], np.uint8))  # [3, W, H]
    image = np.ascontiguousarray(stored.transpose(2, 1, 0))
    image[:7], image[474:], image[:, :7], image[:, 632:] = 0, 0, 0, 0
    return image


def _nyu_depth(data: Path, row: int) -> np.ndarray:
    return _opened(data, lambda file: np.array(file["rawDepths"][row]).T)


def _opened(data: Path, read: Callable[[Any], Any]) -> Any:
    try:
        h5py = importlib.import_module("h5py")
    except ImportError:
        raise ValueError("MATLAB's files of this version need the package h5py: pip install h5py") from None
    with h5py.File(data, "r") as file:
        return read(file)
