"""Features of a whole data set, extracted once and kept on disk.

    features = extract(backbone, val.images, val.read_image, size=448, blocks=(10, 11), cache=Path("cache"))
    features.read([0, 5], blocks=(11,))  # float16 [2, h, w, D]

A cache folder is named after everything that features depend on: the weights, the data (paths, sizes and times of the
files), the size of the images and the kind of features. Change one, and another folder is used. Inside, each block has
its own folder of shards, each written whole or not at all: an interrupted extraction goes on where it stopped, several
processes share the shards, and a later run that asks for further blocks extracts those alone.

    CACHE/3f9c2a7d51e04b86/about.json
                           block-12/00000.npy    float16 [images of the shard, 1 + h * w, D], CLS first

A cache stays below 100 GB and half of the disk that it could have: what was not used for a day goes, the longest unused
first, when there are new features to keep.

Pooled features, for what looks at images as wholes (k-NN, linear classification), keep two vectors an image and block:
CLS and the mean of the patches.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipless.common.distributed import any_process, rank, world_size
from skipless.common.files import write_atomically, write_text
from skipless.common.pixels import center_crop, resample
from skipless.common.progress import Progress
from skipless.datasets.images import UnreadableImage
from skipless.eval.backbones import Backbone, FeatureKind
from skipless.eval.reading import read_batches

SHARD = 32  # images
POOLED_SHARD = 256  # these are small
LIMIT = 100e9  # bytes of features that a cache keeps
DAY = 86_400  # seconds; what was used since may be in use
VERSION = 1  # raised with every change of what is stored


@dataclass(frozen=True, eq=False)
class Features:
    """Features on disk, memory-mapped: reading some images touches no others."""

    folder: Path
    images: int
    blocks: tuple[int, ...]
    """Those extracted, from 0."""
    grid: tuple[int, int]
    """Patches in a column and in a row: h, w. (1, 1) for pooled features, whose one patch is the mean of all."""
    dim: int
    shard: int = SHARD
    """Images in a file."""

    def read(self, rows: Sequence[int] | np.ndarray, blocks: Sequence[int]) -> Tensor:
        """Patch features of some images, float16 [len(rows), h, w, D * len(blocks)], blocks side by side."""
        return self._gather(rows, blocks, slice(1, None)).unflatten(1, self.grid)

    def read_cls(self, rows: Sequence[int] | np.ndarray, blocks: Sequence[int]) -> Tensor:
        """CLS features of some images, float16 [len(rows), D * len(blocks)], blocks side by side."""
        return self._gather(rows, blocks, slice(0, 1))[:, 0]

    @property
    def shards(self) -> int:
        """Number of files a block."""
        return -(-self.images // self.shard)

    def rows(self, index: int) -> range:
        """The images in a shard."""
        return range(index * self.shard, min((index + 1) * self.shard, self.images))

    def path(self, block: int, index: int) -> Path:
        """The file of a shard."""
        return self.folder / f"block-{block + 1:02d}" / f"{index:05d}.npy"

    def left_out(self) -> list[int]:
        """The images that could not be read, where `extract` was told to leave them out: their features are NaN."""
        places = [_open_shard(self.path(self.blocks[-1], index))[:, 0, 0] for index in range(self.shards)]
        return [int(row) for row in np.flatnonzero(np.isnan(np.concatenate(places)))]

    def missing_blocks(self, index: int) -> list[int]:
        """The blocks of which a shard has not been written."""
        return [block for block in self.blocks if not self.path(block, index).exists()]

    def _gather(self, rows: Sequence[int] | np.ndarray, blocks: Sequence[int], tokens: slice) -> Tensor:
        count = len(range(1 + self.grid[0] * self.grid[1])[tokens])
        gathered = np.empty((len(rows), count, self.dim * len(blocks)), np.float16)
        for column, block in enumerate(blocks):
            if block not in self.blocks:
                raise ValueError(f"block {block} was not extracted, only {', '.join(map(str, self.blocks))}")
            place = slice(column * self.dim, (column + 1) * self.dim)
            for position, row in enumerate(rows):
                shard = _open_shard(self.path(block, int(row) // self.shard))
                gathered[position, :, place] = shard[int(row) % self.shard, tokens]
        return torch.from_numpy(gathered)


def extract(
    backbone: Backbone,
    paths: Sequence[Path],
    read: Callable[[int], np.ndarray],
    size: int | tuple[int, int],
    blocks: Sequence[int],
    cache: Path,
    kind: FeatureKind = "tokens",
    batch_size: int = 16,
    workers: int = 0,
    title: str = "features",
    resize: int | None = None,
    pooled: bool = False,
    identity: str | None = None,
    leave_out: bool = False,
) -> Features:
    """Features of images of one size, from the cache as far as they are there.

    Under torchrun the shards are dealt out to the processes, which must see the same cache folder.

    Args:
        paths: the files; where they lie, their sizes and their times tell the data set from others.
        read: image i of them as uint8 [H, W, 3]: its plain content, since the cache is not named after `read`.
        size: side in pixels of the squares that the network sees, or height and width; multiples of the patch. Images
            are resized to it, whatever their proportions (bicubic, antialiased), unless `resize` is given.
        blocks: which blocks, from 0; negative ones count from the end.
        cache: folder of caches.
        kind: see `Backbone.features`; tokens are normed.
        title: of the progress bar.
        resize: short side in pixels, of which the central square of `size` is cut out.
        pooled: keep CLS and the mean of the patches alone.
        identity: what tells the data set from others where images are not files of their own; `paths` then only say
            which image an error is about.
        leave_out: go on past unreadable images, see `Features.left_out`.

    Raises:
        ValueError: an unreadable image, features that are not finite or beyond half precision, a size that is no
            multiple of the patch, or a disk too small.
    """
    height, width = (size, size) if isinstance(size, int) else size
    for side in (height, width):
        _require_multiple(side, backbone.patch)
    numbers = tuple(sorted({_number(block, backbone.depth) for block in blocks}))
    grid = (1, 1) if pooled else (height // backbone.patch, width // backbone.patch)
    shard = POOLED_SHARD if pooled else SHARD
    about = {
        "version": VERSION,
        "checkpoint": backbone.fingerprint(),
        "data": identity or data_sha256(paths),
        "size": size,
        # Spelled as ever: folders of caches are named after this text.
        "resize": "square, bicubic, antialiased" if resize is None else f"short side {resize}, centre",
        "kind": kind,
        "images": len(paths),
        "shard": shard,
        **({"pooled": True} if pooled else {}),
        **({"leave_out": True} if leave_out else {}),
    }
    folder = cache / hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    features = Features(folder, len(paths), numbers, grid, backbone.dim, shard)

    missing = {index: blocks for index in range(features.shards) if (blocks := features.missing_blocks(index))}
    done = len(paths) - sum(len(features.rows(index)) for index in missing)
    image_bytes = (1 + grid[0] * grid[1]) * backbone.dim * 2
    _make_room(cache, image_bytes * sum(len(features.rows(index)) * len(missing[index]) for index in missing), folder)
    # Every process must have looked before one of them writes.
    any_process(False)
    if missing:
        for block in numbers:
            (folder / f"block-{block + 1:02d}").mkdir(parents=True, exist_ok=True)
        if rank() == 0:
            write_text(folder / "about.json", json.dumps({**about, "path": backbone.path}, indent=1) + "\n")
        mine = {index: missing[index] for index in list(missing)[rank() :: world_size()]}
        square = partial(_read_sized, paths, read, (height, width), resize, leave_out)
        _fill_shards(features, mine, backbone, paths, square, kind, pooled, batch_size, workers, title, done)
    any_process(False)  # wait for the others
    for index in missing:
        if features.missing_blocks(index):
            raise ValueError(f"{folder} lacks what another process wrote: all must see the same cache folder")
    return features


def _fill_shards(
    features: Features,
    missing: dict[int, list[int]],
    backbone: Backbone,
    paths: Sequence[Path],
    read: Callable[[int], np.ndarray | None],
    kind: FeatureKind,
    pooled: bool,
    batch_size: int,
    workers: int,
    title: str,
    done: int,
) -> None:
    """Compute and write shards, given the blocks that each of them lacks; `done` images are there already."""
    # What goes through the network together is read together, by one worker: the first batch is there soon, and those
    # that are read ahead fit into memory.
    batches = [
        (index, features.rows(index)[i : i + batch_size])
        for index in missing
        for i in range(0, len(features.rows(index)), batch_size)
    ]
    loader = read_batches(read, [rows for _, rows in batches], workers)
    total = done + sum(len(features.rows(index)) for index in missing)
    with Progress(total=total, initial=done, desc=title, unit="image", active=rank() == 0) as progress:
        for (index, rows), pictures in zip(batches, loader, strict=True):
            shard, blocks = features.rows(index), missing[index]
            if rows[0] == shard[0]:
                shape = (len(blocks), len(shard), 1 + features.grid[0] * features.grid[1], features.dim)
                tokens = np.full(shape, np.nan, np.float16)
            there = {
                row - shard[0]: picture for row, picture in zip(rows, pictures, strict=True) if picture is not None
            }
            if there:
                places = [paths[shard[0] + position] for position in there]
                tokens[:, list(there)] = _tokens(backbone, list(there.values()), blocks, kind, pooled, places)
            if rows[-1] == shard[-1]:
                for block, array in zip(blocks, tokens, strict=True):
                    write_atomically(features.path(block, index), lambda beside, array=array: _save(beside, array))  # type: ignore[misc]
            progress.update(len(rows))


def default_cache() -> Path:
    """~/.cache/skipless/features, or in the folder of temporary files for a user without a home. Safe to delete at any
    time."""
    try:
        cache = Path.home() / ".cache"
    except RuntimeError:  # a container's user that no file knows
        cache = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
    return cache / "skipless" / "features"


def _read_sized(
    paths: Sequence[Path],
    read: Callable[[int], np.ndarray],
    size: tuple[int, int],
    resize: int | None,
    leave_out: bool,
    index: int,
) -> np.ndarray | None:
    """uint8 [*size, 3]; None of what is to be left out. Raises ValueError or OSError, naming the image."""
    try:
        image = read(index)
        return resample(image, *size) if resize is None else center_crop(image, size[0], resize)
    except UnreadableImage:  # names it
        if leave_out:
            return None
        raise
    except (ValueError, OSError) as error:
        raise ValueError(f"{paths[index]}: {error}") from None


def _tokens(
    backbone: Backbone,
    pictures: list[np.ndarray],
    blocks: list[int],
    kind: FeatureKind,
    pooled: bool,
    paths: Sequence[Path],
) -> np.ndarray:
    """float16 [blocks, B, 1 + h * w, D], CLS first; pooled, the mean of the patches stands in their place."""
    outputs = backbone.features(backbone.normalize(np.stack(pictures)), blocks, kind)
    patches = [output.patches.flatten(1, 2) for output in outputs]
    if pooled:
        patches = [x.mean(1, keepdim=True) for x in patches]
    exact = [torch.cat([output.cls[:, None], x], dim=1) for output, x in zip(outputs, patches, strict=True)]
    half = torch.stack([x.half() for x in exact])
    finite = half.isfinite().all()
    tokens = half.cpu().numpy()  # where the host waits for the device, once for all blocks
    if not finite:
        block, picture = (~half.isfinite()).flatten(2).any(2).nonzero()[0].tolist()
        fault = "are beyond half precision" if exact[block].isfinite().all() else "are NaN or infinite"
        raise ValueError(
            f"{paths[picture]}: features of block {blocks[block] + 1} of {backbone.path} {fault}; "
            "check the checkpoint, or take another block"
        )
    return tokens


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:  # given a name, np.save would add an ending
        np.save(file, array)


# Each open shard holds a file descriptor, of which a process often may have no more than 1,024, on macOS 256.
@lru_cache(maxsize=128)
def _open_shard(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _number(block: int, depth: int) -> int:
    if not -depth <= block < depth:
        raise ValueError(f"block {block} does not exist: this model has blocks 0 to {depth - 1}")
    return block % depth


def _require_multiple(size: int, patch: int) -> None:
    if size % patch or size < patch:
        lower = size // patch * patch
        nearest = f"{lower} or {lower + patch}" if lower > 0 else str(patch)
        raise ValueError(f"size {size} is no multiple of the patch, {patch} pixels; use {nearest}")


def data_sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
            state = f"{status.st_size}\0{status.st_mtime_ns}"
        except OSError:  # a link to nowhere, say: reading it will say so
            state = "none"
        digest.update(os.fsencode(os.path.abspath(path)) + f"\0{state}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Kept:
    """Features of one backbone and data set in a cache."""

    folder: Path
    bytes: int
    used: float
    """When, in seconds since 1970."""
    about: dict[str, Any]


def kept_features(cache: Path) -> list[Kept]:
    """What a cache holds, the longest unused first. Other files and folders in it are left alone."""
    kept = []
    for path in cache.glob("[0-9a-f]" * 16 + "/about.json"):
        try:
            about, used = json.loads(path.read_bytes()), path.stat().st_mtime
            size = sum(file.stat().st_size for file in path.parent.rglob("*.npy"))
        except (OSError, ValueError):  # another process is deleting it
            continue
        kept.append(Kept(path.parent, size, used, about))
    return sorted(kept, key=lambda entry: entry.used)


def _forget_old(cache: Path, need: int, own: Path) -> None:
    """Keep a cache, with `need` bytes more, below `LIMIT` and half of the disk that it could have: what was not used
    for a day goes, the longest unused first. Note that `own` is used now."""
    if (own / "about.json").exists():
        os.utime(own / "about.json")
    kept = kept_features(cache)
    held = sum(entry.bytes for entry in kept)
    most = min(LIMIT, (held + shutil.disk_usage(cache).free) / 2)
    for entry in kept:
        if held + need <= most:
            return
        if time.time() - entry.used > DAY:
            shutil.rmtree(entry.folder, ignore_errors=True)
            held -= entry.bytes
            print(f"{cache}: {entry.bytes / 1e9:.1f} GB of features, the longest unused, made room")


def _make_room(cache: Path, need: int, own: Path) -> None:
    cache.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        _forget_old(cache, need, own)
    any_process(False)  # wait for it
    free = shutil.disk_usage(cache).free
    if need > free:
        raise ValueError(
            f"{cache}: the features need {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; name another folder by "
            "--cache, or take fewer blocks or smaller images"
        )
