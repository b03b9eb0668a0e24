"""How soon the first batch is there, and whether memory grows: a folder, a zip archive and shards of many small images.

    python benchmarks/start_up.py --out results/speed/start_up
    python benchmarks/start_up.py --images 5000 --sample 1000 --repeats 1 --out runs/start_up

1. Seconds of `open_images`, and from there to the first batch of views out of a DataLoader with forked workers. The
   sources take turns; medians. The files were just written, so they come from the page cache: what a cold disk or a
   network adds is not in these figures. Tars without an index are a source, too: their headers are read.
2. Memory of the workers at the start and at the end of three epochs over a sample of each source, in one DataLoader as
   in pretraining: the proportional set size (pages that several processes share are divided among them), and what is
   private to each. A control keeps the names as a list of `str`, whose reference counts copy them into every worker:
   the growth that this measurement must be able to see.

The images are hard links to a few hundred different JPEGs of 64 x 64 pixels, in a hundred class folders.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from measuring import markdown, publish, timed
from torch.utils.data import DataLoader

from skipless.common import cli
from skipless.datasets.images import ImageSource, open_images
from skipless.datasets.storage.packing import write_shards
from skipless.ssl.data.crops import CropDataset, Crops, collate
from skipless.ssl.data.loader import leave_signals_to_main

DISTINCT, CLASSES, EPOCHS, BATCH = 300, 100, 3, 64
CROPS = Crops(global_crops_size=32, local_crops_number=0)


@dataclass
class Settings:
    """Start-up and memory."""

    images: int = 100_000
    """How many there are, at least 200."""
    sample: int = 10_000
    """Images an epoch of the memory test."""
    workers: int = 2
    """Processes that load."""
    repeats: int = 5
    """Rounds of the start-up test."""
    folder: Path | None = None
    """Where the images are made, and deleted again; by default in the system's folder for temporary files. They need
    about 7 kB each."""
    out: Path = Path("results/speed/start_up")
    """Result, .json and .md."""


def make_folder(root: Path, count: int) -> None:
    """Class folders of `count` links to a few hundred JPEGs."""
    rng = np.random.default_rng(0)
    distinct = root / "distinct"
    distinct.mkdir()
    for number in range(DISTINCT):
        small = rng.integers(0, 256, (8, 8, 3), np.uint8)
        picture = cv2.resize(small, (64, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(distinct / f"{number}.jpg"), picture)
    for number in range(count):
        path = root / "folder" / f"class_{number % CLASSES:03}" / f"image_{number:08}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        original = distinct / f"{number % DISTINCT}.jpg"
        try:
            os.link(original, path)
        except OSError:  # a file system without hard links, or with few of them
            shutil.copyfile(original, path)


def make_sources(root: Path, count: int) -> tuple[dict[str, Path], dict[str, float]]:
    """Where each source lies, and the seconds it took to make."""

    def pack_zip() -> None:
        with zipfile.ZipFile(root / "images.zip", "w") as archive:
            for name in open_images(root / "folder").names:
                archive.write(root / "folder" / name, name)

    def pack_shards() -> None:  # with one worker: others would import PyTorch first
        write_shards(open_images(root / "folder"), root / "shards", shard_size=20_000_000, workers=1)

    makers = {"folder": lambda: make_folder(root, count), "zip": pack_zip, "shards": pack_shards}
    seconds = {name: timed(make, torch.device("cpu"))[1] for name, make in makers.items()}
    (root / "tars").mkdir()
    for tar in (root / "shards").glob("*.tar"):
        shutil.copyfile(tar, root / "tars" / tar.name)
    names = {"folder": "folder", "zip": "images.zip", "shards": "shards", "tars": "tars"}
    return {name: root / place for name, place in names.items()}, seconds


def load(images: ImageSource, batches: list[list[tuple[int, int]]], workers: int) -> Iterator[dict[str, Any]]:
    """Batches of views, from forked workers as in pretraining on Linux."""
    loader = DataLoader(
        CropDataset(images, CROPS, seed=0), batch_sampler=batches, num_workers=workers, collate_fn=collate,
        worker_init_fn=leave_signals_to_main, multiprocessing_context="fork",
    )  # fmt: skip
    return iter(loader)


def keys(count: int, sample: int, epoch: int) -> list[list[tuple[int, int]]]:
    """Batches of (epoch, index), without repetition within an epoch."""
    order = np.random.default_rng(epoch).permutation(count)[:sample]
    return [[(epoch, int(index)) for index in order[first : first + BATCH]] for first in range(0, len(order), BATCH)]


def start_up(path: Path, workers: int) -> dict[str, float]:
    """Seconds of `open_images`, and from before it to the first batch."""
    began = time.perf_counter()
    images = open_images(path)
    opened = time.perf_counter() - began
    batches = load(images, keys(len(images), BATCH * workers, 0), workers)
    next(batches)
    return {"open_images": opened, "first batch": time.perf_counter() - began}


def memory_mb() -> dict[str, float]:
    """Of all workers together, in MiB: proportional set size, and private pages."""
    total = {"pss": 0.0, "private": 0.0}
    for process in multiprocessing.active_children():
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            kind = {"Pss": "pss", "Private_Clean": "private", "Private_Dirty": "private"}.get(name)
            if kind:
                total[kind] += int(value.split()[0]) / 1024
    return total


def memory_of_epochs(images: ImageSource, sample: int, workers: int) -> dict[str, Any]:
    """Memory of the workers when each epoch's first batch has arrived, and its last."""
    epochs = [keys(len(images), sample, epoch) for epoch in range(EPOCHS)]
    batches = load(images, [batch for epoch in epochs for batch in epoch], workers)
    memory: dict[str, Any] = {"epochs": []}
    began = time.perf_counter()
    for epoch in epochs:
        next(batches)
        start = memory_mb()
        for _ in range(len(epoch) - 1):
            next(batches)
        memory["epochs"].append({"start": start, "end": memory_mb()})
    memory["images a second"] = EPOCHS * sample / (time.perf_counter() - began)
    first, last = memory["epochs"][0], memory["epochs"][-1]["end"]
    memory["growth"] = {kind: last[kind] - first["start"][kind] for kind in ("pss", "private")}
    # The first epoch fills the allocator's and the decoder's buffers.
    memory["growth after the first epoch"] = {kind: last[kind] - first["end"][kind] for kind in ("pss", "private")}
    return memory


def table(result: dict[str, Any]) -> list[str]:
    """The result for people, in Markdown."""
    settings = result["settings"]
    starts = [
        {"source": source}
        | {name: statistics.median(row[name]) for name in row}
        | {f"{name}, range": row[name] for name in row}
        for source, row in result["start_up"].items()
    ]
    memory = [
        {"source": source, "start": row["epochs"][0]["start"]["pss"]}
        | {f"end {number}": epoch["end"]["pss"] for number, epoch in enumerate(row["epochs"], 1)}
        | {key: row[key]["private"] for key in ("growth", "growth after the first epoch")}
        | {"images a second": row["images a second"]}
        for source, row in result["memory"].items()
    ]
    made = ", ".join(f"{name} {value:.1f}" for name, value in result["seconds to make"].items())
    return [
        f"# Start-up and memory: {settings['images']:,} small images",
        "",
        f"{{hardware}}; {settings['workers']} forked workers, batches of {BATCH}; files in the page cache. Seconds to "
        f"list the images, and to the first batch: medians of {settings['repeats']} rounds, the sources in turns.",
        "",
        *markdown(starts),
        "",
        f"Memory of the workers together in MiB, three epochs over {settings['sample']:,} of the images: proportional "
        "set size at the start of the first epoch and at the end of each; growth of the private pages over all three, "
        "and over the last two.",
        "",
        *markdown(memory),
        "",
        f"Seconds to make: {made}.",
    ]


def measure(settings: Settings) -> None:
    """Make the images, measure, and publish."""
    if settings.images < 200 or min(settings.workers, settings.repeats) < 1:
        raise ValueError("--images must be at least 200, --workers and --repeats at least 1")
    if not BATCH <= settings.sample <= settings.images:
        raise ValueError(f"--sample must be {BATCH} to --images")
    if not Path("/proc/self/smaps_rollup").exists():
        raise ValueError("this needs Linux, whose /proc says what memory processes share")
    began = time.perf_counter()
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="start-up-", dir=settings.folder) as folder:
        sources, made = make_sources(Path(folder), settings.images)
        for _ in range(settings.repeats):
            for name, path in sources.items():
                for key, value in start_up(path, settings.workers).items():
                    seconds.setdefault(name, {}).setdefault(key, []).append(value)
        memory = {
            name: memory_of_epochs(open_images(path), settings.sample, settings.workers)
            for name, path in sources.items()
        }
        images = open_images(sources["folder"])
        as_list = replace(images, names=list(images.names))  # type: ignore[arg-type]
        memory["control: names as a list of str"] = memory_of_epochs(as_list, settings.sample, settings.workers)
    kept = {name: value for name, value in asdict(settings).items() if name not in ("folder", "out")}
    result = {
        "task": "start-up and memory",
        "settings": {**kept, "epochs": EPOCHS, "batch": BATCH},
        "start_up": seconds,
        "memory": memory,
        "seconds to make": made,
        "seconds": time.perf_counter() - began,
    }
    publish(settings.out, result, table(result), "cpu")


main = partial(cli.run, measure, Settings, __doc__)

if __name__ == "__main__":
    main()
