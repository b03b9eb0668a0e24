"""Embed a folder of images: vectors by a backbone, in one file, for search, clustering or a classifier of your own.

    python eval/embed.py photos --ckpt runs/photos --out photos.parquet
    python eval/embed.py photos --ckpt timm:vit_small_patch14_dinov2.lvd142m --out photos.npz --vectors cls mean patches
    python eval/embed.py photos.zip --ckpt runs/photos --out photos.csv --vectors mean

Central squares of --size pixels, the last block after its norm. The file holds the images' names and, for each of
--vectors, float16 [D] an image (patches: [h, w, D]); .csv has a column a channel. What was computed is kept in --cache:
after an interruption the same command goes on. Images that cannot be read are left out, and named at the end.
"""

import skipless.common.interruption  # noqa: F401

import csv
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from skipless.common import cli, distributed
from skipless.common.files import printable, write_atomically
from skipless.datasets.images import ImageSource, UnreadableImage, open_images
from skipless.eval.backbones import Precision, Weights, load_backbone
from skipless.eval.features import Features, data_sha256, default_cache, extract
from skipless.ssl.data.loader import loader_workers

Kind = Literal["cls", "mean", "patches"]
ROWS = 256  # images that are in memory together
NAMED = 10  # of the images that could not be read


@dataclass
class Settings:
    """Which images to embed, and how."""

    images: str
    """A folder or zip archive of images, shards, or hf:NAME:SPLIT."""
    ckpt: str = ""
    """Backbone: the folder of a run, a checkpoint's file, a folder of Hugging Face's, hf:NAME or timm:NAME."""
    out: str = ""
    """The file to write: .npz, .csv, or .parquet (which needs pyarrow)."""
    vectors: tuple[Kind, ...] = ("cls", "mean")
    """What of each image: the class token, the mean of the patches, all patches."""
    size: int = 224
    """Side in pixels of the central squares; the short side is resized to 8/7 of it. A size that is no multiple of the
    patch becomes the one below it."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    precision: Precision = "fp32"
    """In which the network computes: fp32, or bf16 where the device is fast in it."""
    batch_size: int = 64
    """Images in one forward pass of the backbone."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int | None = None
    """Processes that read images; by default its share of the cores but two with a GPU, and none on a CPU."""
    cache: str | None = None
    """Folder for features; by default ~/.cache/skipless/features. Safe to delete."""

    def __post_init__(self) -> None:
        if not self.ckpt or not self.out:
            raise ValueError(f"--{'out' if self.ckpt else 'ckpt'} is missing; --help tells what to give")
        if min(self.batch_size, self.size) < 1 or (self.workers or 0) < 0:
            raise ValueError("batch-size and size must be 1 or more, workers 0 or more")
        if not self.vectors or len({*self.vectors}) < len(self.vectors):
            raise ValueError(f"vectors is {' '.join(self.vectors)!r}; give one or more of cls, mean and patches, once")


def embed(cfg: Settings) -> Path:
    """Write the file that the settings ask for, and return its path.

    Raises:
        ValueError, OSError: a backbone, images or a file that cannot be used; no image that can be read.
    """
    device = distributed.start(cfg.device)
    out = Path(cfg.out)
    check_out(out, cfg.vectors)
    source = open_images(cfg.images)
    backbone = load_backbone(cfg.ckpt, cfg.weights).to(device, cfg.precision)
    size = backbone.multiple_below(cfg.size)
    features = extract(
        backbone,
        [Path(source.place(index)) for index in range(len(source))],
        source.read,
        size,
        (-1,),
        Path(cfg.cache).expanduser() if cfg.cache else default_cache(),
        batch_size=cfg.batch_size,
        workers=loader_workers(cfg.workers, device),
        resize=round(size * 8 / 7),
        pooled="patches" not in cfg.vectors,
        identity=None if source.members is None else data_sha256([source.root]) + source.names_sha256,
        leave_out=True,
    )
    reasons = dict(why_unreadable(source, features))
    rows = np.array([index for index in range(len(source)) if index not in reasons])
    if not len(rows):
        raise ValueError(f"{cfg.images}: none of its {len(source):,} images can be read ({reasons[0]})")
    if distributed.rank() == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        names = [printable(source.names[index]) for index in rows]
        write_atomically(out, partial(WRITERS[out.suffix], names, features, rows, cfg.vectors))
        print(f"{out}: {', '.join(cfg.vectors)} of {len(rows):,} images, {features.dim} channels, by {backbone.path}")
        if reasons:
            more = f"; and {len(reasons) - NAMED:,} more" if len(reasons) > NAMED else ""
            named = "; ".join(list(reasons.values())[:NAMED])
            print(f"{len(reasons):,} of {len(source):,} images could not be read and are left out: {named}{more}")
    return out


def why_unreadable(source: ImageSource, features: Features) -> Iterator[tuple[int, str]]:
    """The images that were left out, each with what is wrong with it."""
    for index in features.left_out():
        try:
            source.read(index)
            yield index, f"{printable(source.place(index))}: it can be read by now; delete {features.folder}"
        except UnreadableImage as error:
            yield index, str(error)


def check_out(out: Path, vectors: tuple[Kind, ...]) -> None:
    """Raises ValueError for a file that cannot be written so."""
    if out.suffix not in WRITERS:
        raise ValueError(f"out is {out}; it must end in {', '.join(WRITERS)}")
    if out.exists():
        raise ValueError(f"{out} is there already: delete it, or give another --out")
    if out.suffix == ".csv" and "patches" in vectors:
        raise ValueError("patches are too many for .csv: give --out a file that ends in .npz or .parquet")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ValueError(f"{out} needs the package pyarrow: pip install pyarrow, or give .npz or .csv") from None


def parts(features: Features, all_rows: np.ndarray, kind: Kind) -> Iterator[np.ndarray]:
    """float16 [B, D] of the images of these numbers, [B, h, w, D] for patches."""
    last = features.blocks[-1:]
    for start in range(0, len(all_rows), ROWS):
        rows = all_rows[start : start + ROWS]
        if kind == "cls":
            yield features.read_cls(rows, last).numpy()
        elif kind == "patches":
            yield features.read(rows, last).numpy()
        else:
            yield features.read(rows, last).float().mean((1, 2)).half().numpy()


def write_npz(names: list[str], features: Features, rows: np.ndarray, vectors: tuple[Kind, ...], path: Path) -> None:
    """Arrays `names` and those of `vectors`, as np.load reads them, without holding them all in memory."""
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("names.npy", "w") as file:
            np.save(file, np.array(names))
        for kind in vectors:
            shape = (len(rows), *(features.grid if kind == "patches" else ()), features.dim)
            with archive.open(f"{kind}.npy", "w", force_zip64=True) as file:
                head = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, head)
                for part in parts(features, rows, kind):
                    file.write(part.tobytes())


def write_csv(names: list[str], features: Features, rows: np.ndarray, vectors: tuple[Kind, ...], path: Path) -> None:
    """A line an image: its name, and a column a channel."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["name", *(f"{kind}_{channel}" for kind in vectors for channel in range(features.dim))])
        start = 0
        for together in zip(*(parts(features, rows, kind) for kind in vectors), strict=True):
            lines = np.concatenate(together, axis=1)
            for name, line in zip(names[start : start + len(lines)], lines, strict=True):
                writer.writerow([name, *map(str, line)])
            start += len(lines)


def write_parquet(
    names: list[str], features: Features, rows: np.ndarray, vectors: tuple[Kind, ...], path: Path
) -> None:
    """Columns `name` and those of `vectors`: lists of D float16 (patches: h * w lists of D, rows first)."""
    import pyarrow as pa
    from pyarrow import parquet

    vector = pa.list_(pa.float16(), features.dim)
    cells = pa.list_(vector, features.grid[0] * features.grid[1])
    schema = pa.schema([("name", pa.string()), *((kind, cells if kind == "patches" else vector) for kind in vectors)])
    with parquet.ParquetWriter(path, schema) as writer:
        start = 0
        for together in zip(*(parts(features, rows, kind) for kind in vectors), strict=True):
            columns = [pa.array(names[start : start + len(together[0])])]
            for field, part in zip(list(schema)[1:], together, strict=True):
                lists = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), features.dim)
                if field.type == cells:
                    lists = pa.FixedSizeListArray.from_arrays(lists, cells.list_size)
                columns.append(lists)
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            start += len(together[0])


WRITERS: dict[str, Callable[[list[str], Features, np.ndarray, tuple[Kind, ...], Path], None]] = {
    ".npz": write_npz,
    ".csv": write_csv,
    ".parquet": write_parquet,
}

main = partial(cli.run, embed, Settings, __doc__, positional=True)

if __name__ == "__main__":
    main()
