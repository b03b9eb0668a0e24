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

import skipless.common.interruption  # noqa: F401

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skipless.common import cli
from skipless.datasets.images import open_images
from skipless.datasets.storage.packing import QUALITY, write_shards


@dataclass
class Settings:
    """What is packed, and how."""

    folder: str
    """Images: a folder, a .zip, hf:NAME:SPLIT, or whatever --data.path may be."""
    out: str
    """Folder to make."""
    short_side: int | None = None
    """Resize images whose short side is longer to this many pixels; for crops of 224 pixels, 256 or more. By default
    files are copied as they are."""
    quality: int | None = None
    """JPEG quality of resized images, 1 to 100; by default 90."""
    shard_size: str = "500MB"
    """Bytes a shard: 500MB, 2GB, ..."""
    workers: int | None = None
    """Processes; by default one for each available core."""


def parse_size(text: str) -> int:
    """`500MB`, `2 GB`, `1.5GB`, `4096` -> bytes, with the powers of ten. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip().upper())
    if match is None:
        raise ValueError(f"--shard-size is {text!r}: write it as 500MB or 2GB")
    return int(float(match[1]) * 1000 ** ("KMGT".index(match[2]) + 1 if match[2] else 0))


def shard(settings: Settings) -> None:
    """Pack images, and say what was packed and what was left out."""
    if settings.quality is not None and settings.short_side is None:
        raise ValueError("--quality is for resized images: give --short-side, too, or leave it out")
    source = open_images(settings.folder)
    quality = QUALITY if settings.quality is None else settings.quality
    size = parse_size(settings.shard_size)
    count, unreadable = write_shards(source, settings.out, settings.short_side, quality, size, settings.workers)
    out = Path(settings.out)
    tars = sorted(out.glob("shard-*.tar"))
    megabytes = sum(tar.stat().st_size for tar in tars) / 1e6
    print(f"{out}: {count:,} images in {len(tars)} shard{'s' if len(tars) != 1 else ''}, {megabytes:,.1f} MB")
    if unreadable:
        print(f"left out {len(unreadable):,} unreadable images, listed in {out / 'unreadable.txt'}, such as:")
        print("\n".join(f"  {line}" for line in unreadable[:3]))
    print(f"next: python ssl/pretrain.py --config configs/imagenette_cpu.yaml --data.path {out} --out runs/{out.name}")


main = partial(cli.run, shard, Settings, __doc__, positional=True)

if __name__ == "__main__":
    main()
