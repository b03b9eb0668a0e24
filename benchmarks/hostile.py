"""Files that somebody made to harm whoever opens them, for every reader: weights, pictures, annotations, archives."""

import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file, save_file

Words = tuple[str, list[str]]
Lines = dict[str, list[str]]


class _Harm:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.folder,)


def _weights(content: bytes | Callable[[Path], object], suffix: str) -> Callable[[Path, Path, Lines], Words]:
    def make(work: Path, data: Path, lines: Lines) -> Words:
        path = work / f"weights{suffix}"
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        words = [word for word in lines["knn"] if not word.startswith(("--ckpt", "--out"))]
        return "knn", [*words, f"--ckpt={path}"]

    return make


def _architecture(changes: dict[str, Any]) -> Callable[[Path, Path, Lines], Words]:
    """A run's folder whose description asks for more than its weights are."""

    def make(work: Path, data: Path, lines: Lines) -> Words:
        from safetensors import safe_open

        with safe_open(data / "vit.safetensors", "pt") as file:
            architecture = json.loads(file.metadata()["architecture"]) | changes
        run = work / "run"
        run.mkdir()
        metadata = {"architecture": json.dumps(architecture)}
        save_file(load_file(data / "vit.safetensors"), run / "backbone.safetensors", metadata)
        (run / "backbone.json").write_text(json.dumps({"architecture": architecture, "pool": "mean"}))
        words = [word for word in lines["knn"] if not word.startswith(("--ckpt", "--out"))]
        return "knn", [*words, f"--ckpt={run}"]

    return make


def _pictures(add: Callable[[Path], object]) -> Callable[[Path, Path, Lines], Words]:
    """A folder of images with one more, which `add` makes."""

    def make(work: Path, data: Path, lines: Lines) -> Words:
        folder = work / "images"
        shutil.copytree(data / "scenes/train", folder)
        add(folder)
        words = [word for word in lines["pretrain"] if not word.startswith(("--data.path", "--out", "--monitor"))]
        return "pretrain", [*words, f"--data.path={folder}", "--monitor.every_epochs=0", "--data.max_unreadable=1"]

    return make


def _coco(segmentation: Any, **more: Any) -> Callable[[Path, Path, Lines], Words]:
    """COCO's annotations of one picture, with such a mask."""

    def make(work: Path, data: Path, lines: Lines) -> Words:
        root = work / "coco"
        (root / "val2017").mkdir(parents=True)
        (root / "annotations").mkdir()
        Image.new("RGB", (48, 48), "gray").save(root / "val2017/a.jpg")
        note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 20, 20], "area": 400, "iscrowd": 0}
        content = {
            "images": [{"id": 1, "file_name": "a.jpg", "height": 48, "width": 48}],
            "annotations": [note | {"segmentation": segmentation} | more],
            "categories": [{"id": 1, "name": "a"}],
        }
        (root / "annotations/instances_val2017.json").write_text(json.dumps(content))
        model = [word for word in lines["discovery"] if word.startswith(("--ckpt", "--device"))]
        return "discovery", [
            *model,
            f"--data.root={root}",
            "--data.name=coco",
            "--data.split=val2017",
            "--method=maskcut",
        ]

    return make


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"teacher": _Harm(path.parent / "harm")}, protocol=2))


def _torch_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps({"student": _Harm(path.parent / "harm")}, protocol=2))
        file.writestr("archive/version", "3\n")


def _bomb(folder: Path) -> None:
    """A PNG of 60,000 x 60,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(10_000_000), 9))
    (folder / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b""))


def _zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder.parent / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for image in folder.rglob("*.jpg"):
            file.write(image, image.name)
        with file.open("bomb.jpg", "w", force_zip64=True) as member:
            for _ in range(300):
                member.write(bytes(10_000_000))


def _in_zip(work: Path, data: Path, lines: Lines) -> Words:
    command, words = _pictures(_zip_bomb)(work, data, lines)
    return command, [*words, f"--data.path={work / 'bomb.zip'}"]


def _crosswise(folder: Path) -> None:
    places = [folder / f"folder{number}" for number in range(12)]
    for place in places:
        place.mkdir()
    for place in places:
        for other in places:
            (place / other.name).symlink_to(other)


# What is made: for a folder of its own, the folder of the miniatures and their command lines, a command and its words.
HOSTILE: dict[str, Callable[[Path, Path, Lines], Words]] = {
    "an HTML page as .pth": _weights(b"<!DOCTYPE html><html>404</html>", ".pth"),
    "a Git LFS pointer as .pth": _weights(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", ".pth"
    ),
    "a pickle that runs code": _weights(_pickle, ".pth"),
    "torch's zip of a pickle that runs code": _weights(_torch_pickle, ".pt"),
    "safetensors with a header of 2^60 bytes": _weights(struct.pack("<Q", 2**60) + b"{}", ".safetensors"),
    "JSON nested 100,000 deep as safetensors": _weights(
        struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000, ".safetensors"
    ),
    "an empty file as .safetensors": _weights(b"", ".safetensors"),
    "a backbone of depth 10^9": _architecture({"depth": 10**9}),
    "a backbone of width 10^9": _architecture({"dim": 10**9}),
    "a backbone for images of 10^9 pixels": _architecture({"image_size": 10**9}),
    "a backbone of negative depth": _architecture({"depth": -1}),
    "a PNG of 3.6 billion pixels": _pictures(_bomb),
    "a link to /dev/zero": _pictures(lambda folder: (folder / "a.png").symlink_to("/dev/zero")),
    "a link to a FIFO": _pictures(lambda folder: os.mkfifo(folder / "a.png")),
    "a dangling link": _pictures(lambda folder: (folder / "a.png").symlink_to("nowhere.png")),
    "twelve folders linked crosswise": _pictures(_crosswise),
    "a zip with a member of 3 GB": _in_zip,
    "COCO: a polygon at 1e9": _coco([[1e9, 1e9, 2e9, 1e9, 2e9, 2e9]]),
    "COCO: a polygon of NaN": _coco([[float("nan")] * 6]),
    "COCO: a polygon of three numbers": _coco([[1, 2, 3]]),
    "COCO: no polygon": _coco([]),
    "COCO: an RLE of another size": _coco({"size": [10**9, 10**9], "counts": [10**9]}, iscrowd=1),
    "COCO: an RLE of too many counts": _coco({"size": [48, 48], "counts": [10**9, 10**9]}, iscrowd=1),
    "COCO: a box of null": _coco([[1, 1, 9, 1, 9, 9]], bbox=None),
}
