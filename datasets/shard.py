"""Pack images into tar shards in WebDataset's format, from which they are read without unpacking.

    python datasets/shard.py photos shards
    python datasets/shard.py imagenet/train imagenet-256 --short-side 256
    python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path imagenet-256 --out runs/shards

A million small files are slow to list, to copy and to read over a network; a few hundred shards are not. OUT holds:

    shard-000000.tar ...   KEY.jpg (.png, .webp, .bmp: what the content is) and, where the folders right below FOLDER
                           are classes, KEY.cls with the number of the class; readable by tar and by webdataset
    shards.npz             names, classes and the place of every image, so that any of them is one seek away
    unreadable.txt         the images that were left out, if any, and why

KEY is the path of the image below FOLDER without its extension; further dots in the file name become `_`, since
WebDataset ends a key at the first. Without --short-side the files are copied byte for byte. With it, images whose short
side is longer are turned upright, resized (by averaging over areas) and encoded as JPEG; the others are copied.

The folder OUT appears whole or not at all, and the same images and settings give the same tars, whatever --workers is.
It can be copied anywhere, to a web server or to a bucket: give its URL as --data.path. The server must support range
requests; https works as it is, s3:// and gs:// need the packages s3fs and gcsfs.
"""

import argparse
import hashlib
import io
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import sys
import tarfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from skipless.datasets.images import ImageSource, Names, UnreadableImage, decode, open_images
from skipless.datasets.storage.tar import BLOCK, INDEX, Shards, read_index, split_key, write_index

QUALITY = 90
# Unreadable images, as a share of all, above which something else must be wrong, as a disk that fails. Ten may be.
MOST_UNREADABLE = 0.01
IMAGES_PER_TASK = 16
# By how a file begins: an extension may be wrong, and a data set's rows have none.
KINDS = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"), (b"BM", "bmp"), (b"GIF8", "gif"))


class Packed(NamedTuple):
    """What goes into a shard for one image: the file and its extension; or why it cannot be read."""

    data: bytes
    extension: str
    problem: str = ""


def prepare(source: ImageSource, index: int, short_side: int | None, quality: int) -> Packed:
    """One image as it is packed: see `write_shards`. Every image is decoded once, so that none is packed unreadable."""
    try:
        data = source.read_bytes(index)
        image = decode(data, min_side=0 if short_side else 1)
    except UnreadableImage as error:
        return Packed(b"", "", str(error))
    except ValueError as error:
        return Packed(b"", "", str(UnreadableImage(source.place(index), str(error))))
    height, width = image.shape[:2]
    if not short_side or min(height, width) <= short_side:
        return Packed(data, next((name for start, name in KINDS if data.startswith(start)), "jpg"))
    factor = short_side / min(height, width)
    size = (max(short_side, round(width * factor)), max(short_side, round(height * factor)))
    small = cv2.cvtColor(cv2.resize(image, size, interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2BGR)
    return Packed(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes(), "jpg")


def write_shards(
    source: ImageSource,
    out: str | Path,
    short_side: int | None = None,
    quality: int = QUALITY,
    shard_size: int = 500_000_000,
    workers: int | None = None,
) -> tuple[int, list[str]]:
    """Pack the images of a source into the folder `out`, in the layout described at the top of this file.

    The order is that of the source. The folder appears whole or not at all, and does not depend on `workers`; one that
    already holds this pack is left as it is, with a line on stderr that says so.

    Args:
        out: folder to make; it must not exist, be empty, or hold the pack of the same names and settings.
        short_side: in pixels; images with a longer short side are resized to it. None copies all files as they are.
        quality: of the JPEGs that a resize makes, 1..100.
        shard_size: bytes at which a shard ends, unless one image is larger.
        workers: processes; None = one for each available core.

    Returns:
        The number of images packed, and `path: reason` of those left out, which `unreadable.txt` lists, too.

    Raises:
        ValueError: a setting out of range, an `out` that is a file or holds anything else, or no readable image.
        OSError: the folder cannot be written.
    """
    for field, value, least in (("short_side", short_side, 1), ("shard_size", shard_size, 1), ("workers", workers, 1)):
        if value is not None and value < least:
            raise ValueError(f"{field} is {value}: choose {least} or more")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality is {quality}: choose 1 to 100")
    # Resolved, so that the temporary folder lies beside the real one also where `out` is a symlink.
    out = Path(out).expanduser().resolve()
    text, ends = source.names.arrays()
    digest = hashlib.sha256(text.tobytes() + ends.tobytes() + "\0".join(source.classes).encode())
    digest.update(b"" if source.labels is None else source.labels.tobytes())
    digest.update(_contents(source))
    about = {
        "images": len(source),
        "content": digest.hexdigest(),
        "short_side": short_side,
        "quality": quality if short_side else None,
        "shard_size": shard_size,
    }
    there = _already_there(out, about)
    if there is not None:
        print(f"{out} already holds this pack: nothing to do", file=sys.stderr)
        return there
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.unfinished-{secrets.token_hex(4)}")
    unfinished.mkdir()
    try:
        tasks = -(-len(source) // IMAGES_PER_TASK)
        # Starting a process takes as long as some hundred images.
        processes = min(workers or _available_cores(), -(-tasks // 8))
        images = _prepared(source, short_side, quality, processes)
        shards, unreadable = _write(source, images, unfinished, shard_size)
        if not len(shards.names):
            raise ValueError(f"{source.origin}: none of its images can be read, the first being {unreadable[0]}")
        if len(unreadable) > max(10, MOST_UNREADABLE * len(source)):
            raise ValueError(
                f"{source.origin}: {len(unreadable):,} of {len(source):,} images cannot be read, more than "
                f"{100 * MOST_UNREADABLE:g} %, the first being {unreadable[0]}; nothing was written"
            )
        if unreadable:
            (unfinished / "unreadable.txt").write_text("\n".join(unreadable) + "\n", encoding="utf-8")
        write_index(unfinished, shards, about)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return len(shards.names), unreadable


def _contents(source: ImageSource) -> bytes:
    """What tells images from others of the same names: sizes and times of the files of a folder; of an archive, tars or
    Hugging Face data the table of its members and where it lies."""
    if source.members is not None:
        return source.members.tobytes() + source.origin.encode()
    status = [os.stat(source.root / name) for name in source.names if (source.root / name).exists()]
    return np.array([(found.st_size, found.st_mtime_ns) for found in status], np.int64).tobytes()


def _write(source: ImageSource, images: Iterator[Packed], folder: Path, shard_size: int) -> tuple[Shards, list[str]]:
    files: list[str] = []
    kept: list[int] = []
    unreadable: list[str] = []
    table: list[tuple[int, int, int, int]] = []
    keys: set[str] = set()
    archive: tarfile.TarFile | None = None
    try:
        for index, (data, extension, problem) in enumerate(
            tqdm(images, total=len(source), desc=f"packing {source.origin}", unit="image")
        ):
            if problem:
                unreadable.append(problem)
                continue
            if archive is None or (archive.offset and archive.offset + len(data) + 3 * BLOCK > shard_size):
                if archive is not None:
                    _close(archive)
                files.append(f"shard-{len(files):06d}.tar")
                archive = tarfile.open(  # noqa: SIM115 - closed below
                    folder / files[-1], "w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
                )
            key = _key(source.names[index], index, keys)
            offset = _add(archive, f"{key}.{extension}", data)
            if source.labels is not None:
                _add(archive, f"{key}.cls", str(source.labels[index]).encode())
            kept.append(index)
            table.append((len(files) - 1, offset, len(data), zlib.crc32(data)))
    finally:
        if archive is not None:
            _close(archive)
    labels = None if source.labels is None else source.labels[kept]
    names = Names([source.names[index] for index in kept])
    places = tuple(str(folder / name) for name in files)
    return Shards(places, names, labels, source.classes, np.array(table, np.int64).reshape(-1, 4)), unreadable


def _key(name: str, index: int, taken: set[str]) -> str:
    """The path without extension and without further dots; where two are alike (`1.jpg`, `1.png`), with a number."""
    folder, slash, file = name.rpartition("/")
    stem = file.rpartition(".")[0] or file
    plain = key = folder + slash + stem.replace(".", "_")
    while key in taken:
        key = f"{plain}~{index}" if key == plain else f"{key}~"
    assert split_key(key + ".jpg") == (key, ".jpg")
    taken.add(key)
    return key


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file, alike whoever writes it and when. Returns where its data begin."""
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
    archive.members.clear()  # type: ignore[attr-defined]  # a million entries that nobody will ask for
    return archive.offset - -(-len(data) // BLOCK) * BLOCK


def _close(archive: tarfile.TarFile) -> None:
    archive.close()
    with open(str(archive.name), "rb+") as file:
        os.fsync(file.fileno())


def _prepared(source: ImageSource, short_side: int | None, quality: int, processes: int) -> Iterator[Packed]:
    """All images in order, prepared in this process or in others; some hundred are in memory at a time."""
    if processes == 1:
        for index in range(len(source)):
            yield prepare(source, index, short_side, quality)
        return
    # Spawned, not forked: the caller may hold threads or a GPU.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (source, short_side, quality))
    starts = iter(range(0, len(source), IMAGES_PER_TASK))
    waiting: deque[Future[list[Packed]]] = deque()
    try:
        while True:
            while len(waiting) < 4 * processes and (start := next(starts, None)) is not None:
                waiting.append(pool.submit(_prepare_some, range(start, min(start + IMAGES_PER_TASK, len(source)))))
            if not waiting:
                return
            yield from waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_settings: tuple[Any, ...] = ()


def _start_worker(source: ImageSource, short_side: int | None, quality: int) -> None:
    global _settings
    _settings = (source, short_side, quality)
    cv2.setNumThreads(1)
    # Ctrl-C reaches every process of the terminal: only the parent answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _prepare_some(indices: range) -> list[Packed]:
    source, short_side, quality = _settings
    return [prepare(source, index, short_side, quality) for index in indices]


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _already_there(out: Path, about: dict[str, Any]) -> tuple[int, list[str]] | None:
    """What `write_shards` returned when it wrote this pack; None for a new or an empty folder; else ValueError."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise ValueError(f"{out} is a file: shards are written as a folder; choose another path")
    if not (out / INDEX).exists():
        if any(out.iterdir()):
            raise ValueError(f"{out} holds other files: choose a new or an empty folder")
        return None
    shards, found = read_index(str(out))
    differing = [
        f"{key} {found.get(key)} (asked for: {value})" for key, value in about.items() if found.get(key) != value
    ]
    if differing:
        raise ValueError(f"{out} holds another pack, with {', '.join(differing)}: delete it, or choose another folder")
    record = out / "unreadable.txt"
    return len(shards.names), record.read_text(encoding="utf-8").splitlines() if record.exists() else []


def parse_size(text: str) -> int:
    """`500MB`, `2 GB`, `1.5GB`, `4096` -> bytes, with the powers of ten. Raises ValueError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if found is None:
        raise ValueError(f"--shard-size is {text!r}: write it as 500MB or 2GB")
    return int(float(found[1]) * 1000 ** ("KMGT".index(found[2]) + 1 if found[2] else 0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: see the docstring of this file."""
    parser = argparse.ArgumentParser(
        prog="datasets/shard.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="images: a folder, a .zip, hf:NAME:SPLIT, or whatever --data.path may be"
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--short-side", type=int, metavar="PIXELS",
        help="resize images whose short side is longer to this one; for crops of 224 pixels, 256 or more. By default "
        "files are copied as they are",
    )  # fmt: skip
    parser.add_argument(
        "--quality", type=int, metavar="1..100", help=f"JPEG quality of resized images (default {QUALITY})"
    )
    parser.add_argument(
        "--shard-size", default="500MB", metavar="SIZE", help="bytes a shard: 500MB (default), 2GB, ..."
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes; by default one for each available core")
    settings = parser.parse_args(arguments)
    try:
        if settings.quality is not None and settings.short_side is None:
            raise ValueError("--quality is for resized images: give --short-side, too, or leave it out")
        source = open_images(settings.folder)
        quality = QUALITY if settings.quality is None else settings.quality
        size = parse_size(settings.shard_size)
        count, unreadable = write_shards(source, settings.out, settings.short_side, quality, size, settings.workers)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:  # the last from a ~user that does not exist
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    out = Path(settings.out).expanduser()
    tars = sorted(out.glob("shard-*.tar"))
    megabytes = sum(tar.stat().st_size for tar in tars) / 1e6
    print(f"{out}: {count:,} images in {len(tars)} shard{'s' if len(tars) != 1 else ''}, {megabytes:,.1f} MB")
    if unreadable:
        print(f"left out {len(unreadable):,} unreadable images, listed in {out / 'unreadable.txt'}, such as:")
        print("\n".join(f"  {line}" for line in unreadable[:3]))
    print(f"next: python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path {out} --out runs/{out.name}")


if __name__ == "__main__":
    main()
