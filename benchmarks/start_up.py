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

import argparse
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from torch.utils.data import DataLoader

from skipless.common.files import write_result
from skipless.common.provenance import provenance
from skipless.datasets.images import ImageSource, open_images
from skipless.datasets.storage.packing import write_shards
from skipless.ssl.data.crops import CropDataset, Crops, collate
from skipless.ssl.data.loader import leave_signals_to_main

DISTINCT, CLASSES, EPOCHS, BATCH = 300, 100, 3, 64
CROPS = Crops(global_crops_size=32, local_crops_number=0)


def make_sources(root: Path, count: int) -> tuple[dict[str, Path], dict[str, float]]:
    """Where each source lies, and the seconds it took to make."""
    rng = np.random.default_rng(0)
    folder, distinct, seconds = root / "folder", root / "distinct", {}
    began = time.perf_counter()
    distinct.mkdir()
    for number in range(DISTINCT):
        small = rng.integers(0, 256, (8, 8, 3), np.uint8)
        picture = cv2.resize(small, (64, 64), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(distinct / f"{number}.jpg"), picture)
    for number in range(count):
        path = folder / f"class_{number % CLASSES:03}" / f"image_{number:08}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        original = distinct / f"{number % DISTINCT}.jpg"
        try:
            os.link(original, path)
        except OSError:  # a file system without hard links, or with few of them
            shutil.copyfile(original, path)
    seconds["folder"] = time.perf_counter() - began
    began = time.perf_counter()
    source = open_images(folder)
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name in source.names:
            archive.write(folder / name, name)
    seconds["zip"] = time.perf_counter() - began
    began = time.perf_counter()
    write_shards(source, root / "shards", shard_size=20_000_000, workers=1)  # others would import PyTorch first
    seconds["shards"] = time.perf_counter() - began
    (root / "tars").mkdir()
    for tar in (root / "shards").glob("*.tar"):
        shutil.copyfile(tar, root / "tars" / tar.name)
    sources = {"folder": folder, "zip": root / "images.zip", "shards": root / "shards", "tars": root / "tars"}
    return sources, seconds


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
    found: dict[str, Any] = {"epochs": []}
    began = time.perf_counter()
    for epoch in epochs:
        next(batches)
        start = memory_mb()
        for _ in range(len(epoch) - 1):
            next(batches)
        found["epochs"].append({"start": start, "end": memory_mb()})
    found["images a second"] = EPOCHS * sample / (time.perf_counter() - began)
    first, last = found["epochs"][0], found["epochs"][-1]["end"]
    found["growth"] = {kind: last[kind] - first["start"][kind] for kind in ("pss", "private")}
    # The first epoch fills the allocator's and the decoder's buffers.
    found["growth after the first epoch"] = {kind: last[kind] - first["end"][kind] for kind in ("pss", "private")}
    return found


def table(result: dict[str, Any]) -> str:
    """The result for people, in Markdown."""
    settings = result["settings"]
    lines = [
        f"# Start-up and memory: {settings['images']:,} small images",
        "",
        f"{result['hardware']}; {settings['workers']} forked workers, batches of {BATCH}; files in the page cache. "
        f"Medians of {settings['repeats']} rounds in which the sources take turns, least to most in brackets.",
        "",
        "| source | seconds to list | to the first batch |",
        "|---|---|---|",
    ]
    for name, row in result["start_up"].items():
        cells = (f"{statistics.median(row[key]):.2f} ({min(row[key]):.2f} to {max(row[key]):.2f})" for key in row)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"Memory of the workers together in MiB, three epochs over {settings['sample']:,} of the images: proportional "
        "set size at the start of the first epoch and at the end of each; growth of the private pages over all three, "
        "and over the last two.",
        "",
        "| source | start | end 1 | end 2 | end 3 | private, growth | after epoch 1 | images a second |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in result["memory"].items():
        ends = [row["epochs"][0]["start"]["pss"], *(epoch["end"]["pss"] for epoch in row["epochs"])]
        growth = [row[key]["private"] for key in ("growth", "growth after the first epoch")]
        lines.append(
            f"| {name} | {' | '.join(f'{mb:.1f}' for mb in ends)} | {growth[0]:+.1f} | {growth[1]:+.1f} | "
            f"{row['images a second']:.0f} |"
        )
    made = ", ".join(f"{name} {seconds:.1f}" for name, seconds in result["seconds to make"].items())
    return "\n".join([*lines, "", f"Seconds to make: {made}.", ""])


def main() -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="How many there are, at least 200.")
    parser.add_argument("--sample", type=int, default=10_000, help="Images an epoch of the memory test.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that load.")
    parser.add_argument("--repeats", type=int, default=5, help="Rounds of the start-up test.")
    parser.add_argument("--folder", type=Path, help="Where the images are made, and deleted again; by default in the "
                        "system's folder for temporary files. They need about 7 kB each.")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("results/speed/start_up"), help="Result, .json and .md.")
    arguments = parser.parse_args()
    try:
        if arguments.images < 200 or min(arguments.workers, arguments.repeats) < 1:
            raise ValueError("--images must be at least 200, --workers and --repeats at least 1")
        if not BATCH <= arguments.sample <= arguments.images:
            raise ValueError(f"--sample must be {BATCH} to --images")
        if not Path("/proc/self/smaps_rollup").exists():
            raise ValueError("this needs Linux, whose /proc says what memory processes share")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    began = time.perf_counter()
    seconds: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="start-up-", dir=arguments.folder) as folder:
        sources, made = make_sources(Path(folder), arguments.images)
        for _ in range(arguments.repeats):
            for name, path in sources.items():
                for key, value in start_up(path, arguments.workers).items():
                    seconds.setdefault(name, {}).setdefault(key, []).append(value)
        memory = {}
        for name, path in sources.items():
            memory[name] = memory_of_epochs(open_images(path), arguments.sample, arguments.workers)
        images = open_images(sources["folder"])
        as_list = replace(images, names=list(images.names))  # type: ignore[arg-type]
        memory["control: names as a list of str"] = memory_of_epochs(as_list, arguments.sample, arguments.workers)
    result = {
        "task": "start-up and memory",
        "settings": {
            "images": arguments.images,
            "sample": arguments.sample,
            "workers": arguments.workers,
            "repeats": arguments.repeats,
            "epochs": EPOCHS,
            "batch": BATCH,
        },
        **provenance("cpu"),
        "start_up": seconds,
        "memory": memory,
        "seconds to make": made,
        "seconds": time.perf_counter() - began,
    }
    write_result(arguments.out, result, table(result))
    print(table(result))


if __name__ == "__main__":
    main()
