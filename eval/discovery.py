"""Object discovery without labels: LOST, TokenCut or MaskCut on the features of any ViT, scored by CorLoc or AP.

    python eval/discovery.py --method tokencut --ckpt dino_vits16.pth --data.name voc07 --data.root VOCdevkit
    python eval/discovery.py --method maskcut --ckpt runs/photos --data.name coco --data.root coco --out found
    python eval/discovery.py --method lost --every-block --ckpt runs/photos --data.name voc12 --data.root VOCdevkit
    python eval/discovery.py --method tokencut --ckpt runs/photos --data.name folder --data.root my_photos --out found

Images keep their size, as published, and are padded with zeros at the right and the bottom to a multiple of the patch
(MaskCut: squares of 480 pixels). LOST and TokenCut find one object an image; CorLoc is the share of images in which its
box has an IoU of at least 0.5 with any true one; images without a true box are left out of it. MaskCut finds up to
three; they are scored by COCO's AP without classes, in which every image counts.

With --out: discovery.json and discovery.md, detections.json (boxes and masks in COCO's result format) and pictures.png.
Unreadable images of a folder are left out and listed; in a set with labels they are an error.
An interrupted run with --out is continued by the same command. torchrun shares the images out.
"""

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from skipless.common import cli, distributed
from skipless.common.files import write_result, write_text
from skipless.common.pixels import resample
from skipless.common.settings import plain
from skipless.datasets.labels.boxes import BoxSet, folder_boxes
from skipless.datasets.labels.coco import coco20k, coco_boxes
from skipless.datasets.labels.counts import BOX_COUNTS, describe_split
from skipless.datasets.labels.voc import scenes_boxes, voc_boxes
from skipless.eval.backbones import Backbone, FeatureKind, Weights, choose_block, load_backbone, pad_to_patch, untrained
from skipless.eval.evaluation import keep_other_result, result_of
from skipless.eval.features import data_sha256
from skipless.eval.objects.localization import Localization, lost, maskcut, tokencut
from skipless.eval.objects.report import draw, report
from skipless.eval.objects.scores import detections, graph_report, score
from skipless.ssl.data.loader import leave_signals_to_main, loader_workers

PICTURES = 12


@dataclass
class DataSettings:
    """Where objects are looked for."""

    name: Literal["voc07", "voc12", "coco20k", "coco", "scenes", "folder"]
    """Data set. coco is any instances file of COCO; folder is any folder of images, without a score."""
    root: str
    """Its folder, laid out as its authors ship it: VOCdevkit, COCO's, the scenes' or the images' folder."""
    split: str | None = None
    """Split: for VOC and scenes a list in ImageSets/Main, by default trainval (scenes: val); for coco the part of
    annotations/instances_SPLIT.json, by default val2017."""
    names: str | None = None
    """coco20k: file with the names of its 19,817 images (datasets/coco_20k_filenames.txt in the release of LOST)."""


@dataclass
class Settings:
    """Object discovery."""

    ckpt: str
    """Backbone: the folder of a run; a .pt, .pth or .safetensors of ours, DINO, DINOv2 or timm; or timm:NAME."""
    data: DataSettings
    method: Literal["lost", "tokencut", "maskcut"] = "tokencut"
    """lost (arXiv 2109.14279), tokencut (arXiv 2202.11539) or maskcut (CutLER, arXiv 2301.11320)."""
    features: FeatureKind = "keys"
    """What patches are compared by. keys is the published way; where the trained bias of the keys makes all patches
    alike (the run warns of it), keys_without_bias."""
    block: str = "last"
    """Block whose features are taken: last, or a number from 1."""
    every_block: bool = False
    """CorLoc (or AP) of every block, in one pass over the images."""
    no_hard: bool = False
    """Drop difficult and truncated boxes, and the images left with none."""
    size: int | None = None
    """Side in pixels of squares that images are resized to; by default the original size (maskcut: 480)."""
    tau: float | None = None
    """tokencut, maskcut: cosine above which two patches are tied; by default the published 0.2 and 0.15."""
    weights: Weights = "teacher"
    """Which half of a training checkpoint that holds a teacher and a student."""
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    out: str | None = None
    """Folder for discovery.json, discovery.md, detections.json and pictures.png; by default nothing is written."""
    seed: int = 0
    """Of the bootstrap (and of random weights)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    batch_size: int = 8
    """Images of one padded size that go through the network together. Changes speed and memory alone."""
    workers: int | None = None
    """Processes that read images; by default all cores shared out with a GPU, and none on a CPU, which needs them
    itself."""


def discover(settings: Settings) -> dict[str, Any]:
    """Find objects as `settings` say, score them, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    device = distributed.start(settings.device)
    began = time.perf_counter()
    backbone = load_backbone(settings.ckpt, settings.weights)
    if settings.untrained:
        backbone = untrained(backbone, settings.seed)
    # In float32, as published: thresholds on cosines and signs of eigenvectors hang on small differences.
    backbone = backbone.to(device)
    blocks = choose_block(settings.block, settings.every_block, backbone)
    size = check(settings, backbone)
    images, annotations = open_data(settings.data)
    official = BOX_COUNTS.get((images.name, images.split))
    described = describe_split(images.name, images.split, len(images), official)
    dropped = {}
    if settings.no_hard:
        images, boxes, without = images.without_hard()
        dropped = {"dropped_boxes": boxes, "dropped_images": without}
        described += f", less {without:,} without an easy box"
    protocol = protocol_id(settings, blocks, size)
    first = distributed.rank() == 0
    if first:
        print(f"{protocol}: {backbone.architecture} ({backbone.path}) on {device}", flush=True)
        scored = sum(len(boxes) > 0 for boxes in images.boxes)
        print(f"{described}; {scored:,} with boxes", flush=True)

    out = Path(settings.out) if settings.out else None
    if out:
        keep_other_result(out / "discovery.json", plain(settings))
        out.mkdir(parents=True, exist_ok=True)
    shown = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int).tolist()
    entries = find_all(backbone, images, blocks, settings, size, shown, out)
    found = [entry for entry in entries if "unreadable" not in entry]
    unreadable = [entry["unreadable"] for entry in entries if "unreadable" in entry]
    if not found:
        raise ValueError(f"{settings.data.root}: none of its {len(images):,} images can be read ({unreadable[0]})")
    main = len(blocks) - 1
    scores = [score(images, annotations, found, settings.method, settings.seed, block) for block in range(len(blocks))]
    figure = scores[main]
    result = result_of(
        "discovery", protocol, images.name, images.split, len(images), figure["metric"], figure["value"],
        figure["details"], backbone, plain(settings), settings.seed, time.perf_counter() - began, device, official,
    )  # fmt: skip
    result["details"] |= {
        "data": described,
        **dropped,
        "block": blocks[main] + 1,
        "image_size": size,
        **graph_report(found, main),
        "unreadable": unreadable,
    }
    if settings.every_block:
        result["details"]["every_block"] = [
            {"block": block + 1, "metric": of_block["metric"], "value": of_block["value"]}
            for block, of_block in zip(blocks, scores, strict=True)
        ]
    if first:
        text = report(result)
        if out:
            write_text(out / "detections.json", json.dumps(detections(images, found, main)) + "\n")
            draw(images, found, main, shown, settings.method, out / "pictures.png")
            write_result(out / "discovery", result, text)
            for path in out.glob("found-*.jsonl"):
                path.unlink()
        print("\n" + text, end="")
        if out:
            print(f"\nwritten: {out / 'discovery.json'}, discovery.md, detections.json, pictures.png")
    return result


def open_data(data: DataSettings) -> tuple[BoxSet, Path | None]:
    """Images with their boxes, and the annotation file for COCO's."""
    if data.name != "coco20k" and data.names:
        raise ValueError(f"data.names is for coco20k, and data.name is {data.name}; leave it out")
    if data.name in ("coco20k", "folder") and data.split:
        raise ValueError(f"data.split has no effect on {data.name}; leave it out")
    if data.name == "scenes":
        return scenes_boxes(data.root, data.split or "val"), None
    if data.name in ("voc07", "voc12"):
        return voc_boxes(data.root, data.split or "trainval", 2007 if data.name == "voc07" else 2012), None
    if data.name == "folder":
        return folder_boxes(data.root), None
    root = Path(data.root).expanduser()
    if data.name == "coco20k":
        if not data.names:
            raise ValueError("coco20k needs data.names, the list of its images (in the release of LOST)")
        return coco20k(root, data.names), root / "annotations" / "instances_train2014.json"
    split = data.split or "val2017"
    annotations = root / "annotations" / f"instances_{split}.json"
    if not annotations.exists():
        there = sorted(path.stem.removeprefix("instances_") for path in root.glob("annotations/instances_*.json"))
        raise FileNotFoundError(f"{annotations}: no such file; splits that are there: {', '.join(there) or 'none'}")
    folder = next((f for f in (root / split, root / "images" / split) if f.is_dir()), root / split)
    return coco_boxes(annotations, folder), annotations


def check(settings: Settings, backbone: Backbone) -> int | None:
    """The side of the squares that images are resized to, None for the original size."""
    if settings.batch_size < 1 or (settings.workers or 0) < 0:
        raise ValueError("batch-size must be 1 or more, and workers 0 or more")
    if settings.method == "lost" and settings.tau is not None:
        raise ValueError("tau has no effect on lost, whose threshold is 0; leave it out")
    if settings.no_hard and settings.data.name not in ("voc07", "voc12", "scenes"):
        raise ValueError(
            f"no-hard: {settings.data.name} does not tell which boxes are difficult or truncated; leave it out"
        )
    if settings.size is None and settings.method == "maskcut":
        return max(480 // backbone.patch, 1) * backbone.patch
    if settings.size is not None and (settings.size % backbone.patch or settings.size < backbone.patch):
        raise ValueError(f"size is {settings.size}; it must be a multiple of the patch, {backbone.patch} pixels")
    return settings.size


def protocol_id(settings: Settings, blocks: list[int], size: int | None) -> str:
    """As in `voc07-tokencut`, with every departure from the published way named behind it."""
    parts = [f"{settings.data.name}-{settings.method}"]
    if settings.features != "keys":
        parts.append(settings.features)
    if settings.block != "last":
        parts.append(f"block-{blocks[-1] + 1}")
    if settings.size is not None:
        parts.append(f"{size}px")
    if settings.tau is not None:
        parts.append(f"tau-{settings.tau:g}")
    if settings.no_hard:
        parts.append("no-hard")
    return "/".join(parts)


def find_all(
    backbone: Backbone,
    images: BoxSet,
    blocks: list[int],
    settings: Settings,
    size: int | None,
    shown: list[int],
    out: Path | None,
) -> list[dict[str, Any]]:
    """Objects of every image, from an interrupted run's files in `out` as far as they are there.

    Returns:
        For each image {"index", "size": [H, W], "blocks": for each block {"objects": [{"box", "rle"}, ...], "edges",
        "degenerate", "fallback"}, "map": of the last block, for the images in `shown`}, or {"index", "unreadable": why}
        for one of a folder that cannot be read; on every process.
    """
    identity = {
        "checkpoint": backbone.fingerprint(),
        "data": [data_sha256(images.images), images.upright],
        "settings": [settings.method, settings.features, blocks, size, settings.tau],
    }
    known: dict[int, dict[str, Any]] = {}
    for path in sorted(out.glob("found-*.jsonl")) if out else []:
        known |= _read_found(path, identity)
    distributed.any_process(False)  # all have read before one writes
    log = out / f"found-{distributed.rank()}.jsonl" if out else None
    if log and log.exists():
        os.truncate(log, log.read_bytes().rfind(b"\n") + 1)
    todo = [index for index in range(len(images)) if index not in known]
    batches = _batches(images, todo, backbone.patch, size, settings.batch_size)[
        distributed.rank() :: distributed.world_size()
    ]
    threshold: dict[str, Any] = {} if settings.tau is None else {"tau": settings.tau}
    locate: Any = {
        "lost": lost,
        "tokencut": partial(tokencut, **threshold),
        "maskcut": partial(maskcut, **threshold),
    }[settings.method]
    loader = DataLoader(
        _Pictures(images, size),
        batch_sampler=batches,
        num_workers=loader_workers(settings.workers, backbone.model.pos_embed.device),
        collate_fn=list,
        worker_init_fn=leave_signals_to_main,
    )
    mine: list[dict[str, Any]] = []
    share = sum(map(len, batches))
    with tqdm(total=share, desc=settings.method, unit="image", disable=distributed.rank() > 0) as progress:
        for batch, samples in zip(batches, loader, strict=True):
            entries: list[dict[str, Any]] = []
            for index, sample in zip(batch, samples, strict=True):
                if isinstance(sample, str):
                    # A set with labels is scored as a whole; any folder of photographs has damaged ones.
                    if images.name != "folder":
                        raise ValueError(sample)
                    entries.append({"index": index, "unreadable": sample})
            for part in _by_size(batch, samples, backbone.patch):
                entries += _find(backbone, images, part, blocks, settings.features, locate, shown)
            if log:
                _append_found(log, identity, entries)
            mine += entries
            progress.update(len(batch))
    for part in distributed.gather_objects(mine):
        known |= {entry["index"]: entry for entry in part}
    return [known[index] for index in range(len(images))]


def _by_size(batch: list[int], samples: list[Any], patch: int) -> list[list[tuple[int, Any]]]:
    """The readable images of a batch with their indices, those of one padded size together. It is one list, unless a
    header told another size than the picture has: an EXIF orientation does."""
    groups: dict[tuple[int, int], list[tuple[int, Any]]] = defaultdict(list)
    for index, sample in zip(batch, samples, strict=True):
        if isinstance(sample, str):
            continue
        height, width = sample[0].shape[:2]
        groups[-height // patch, -width // patch].append((index, sample))
    return list(groups.values())


def _find(
    backbone: Backbone,
    images: BoxSet,
    part: list[tuple[int, Any]],
    blocks: list[int],
    kind: FeatureKind,
    locate: Any,
    shown: list[int],
) -> list[dict[str, Any]]:
    """Entries of images of one padded size."""
    batch, samples = zip(*part, strict=True)
    for index, (picture, _) in part:
        _require_memory(images.images[index], picture.shape, backbone)
    padded = [pad_to_patch(backbone.normalize(picture[None]), backbone.patch) for picture, _ in samples]
    features = backbone.features(torch.cat(padded), blocks, kind)
    entries: list[dict[str, Any]] = [
        {"index": index, "size": list(original), "blocks": []}
        for index, (_, original) in zip(batch, samples, strict=True)
    ]
    for block, found in zip(blocks, features, strict=True):
        broken = (~found.patches.isfinite()).flatten(1).any(1)
        if broken.any():
            path = images.images[batch[int(broken.nonzero()[0])]]
            raise ValueError(
                f"{path}: {kind} of block {block + 1} of {backbone.path} are NaN or infinite; check the checkpoint"
            )
        for entry, (picture, _), result in zip(entries, samples, locate(found.patches), strict=True):
            objects: list[Localization] = result if isinstance(result, list) else [result]
            masks = [_pixels(o.mask, picture.shape[:2], entry["size"], backbone.patch) for o in objects]
            entry["blocks"].append(
                {
                    "objects": [{"box": _box(mask), "rle": _rle(mask)} for mask in masks],
                    "edges": round(objects[0].edges, 4),
                    "degenerate": objects[0].degenerate,
                    "fallback": any(o.fallback for o in objects),
                }
            )
            if block == blocks[-1] and entry["index"] in shown:
                entry["map"] = objects[0].map.round(4).tolist()
    return entries


def _require_memory(path: Path, shape: tuple[int, ...], backbone: Backbone) -> None:
    """Raises ValueError where the graph of one image, N x N numbers of 8 bytes, would not fit: the system would kill
    the run without a word."""
    patches = math.ceil(shape[0] / backbone.patch) * math.ceil(shape[1] / backbone.patch)
    device = backbone.model.pos_embed.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    if 8 * patches**2 > memory:
        raise ValueError(
            f"{path}: {shape[1]} x {shape[0]} pixels are {patches:,} patches, whose graph takes "
            f"{8 * patches**2 / 1e9:.0f} GB of memory; use --size, or smaller images"
        )


def _pixels(mask: np.ndarray, fed: tuple[int, int], original: list[int], patch: int) -> np.ndarray:
    """A mask of patches in pixels of the original image: bool [H, W]. A pixel takes the patch its centre lies in."""
    rows, columns = (((2 * np.arange(o) + 1) * f // (2 * o)) // patch for o, f in zip(original, fed, strict=True))
    return mask[rows[:, None], columns]


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):  # an object smaller than a pixel, after a large image was resized
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def _read_found(path: Path, identity: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Entries of an interrupted run, but for a last line that was cut off."""
    *lines, _ = path.read_bytes().split(b"\n")
    if not lines:
        return {}
    try:
        of, *entries = map(json.loads, lines)
        found = {entry["index"]: entry for entry in entries}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete it, and the same command starts without it") from None
    if of != identity:
        raise ValueError(f"{path} is of a run with other settings, weights or data: delete it, or give another --out")
    return found


def _append_found(path: Path, identity: dict[str, Any], entries: list[dict[str, Any]]) -> None:
    with open(path, "a") as file:
        first = [] if file.tell() else [identity]
        file.writelines(json.dumps(line) + "\n" for line in [*first, *entries])


def _batches(images: BoxSet, todo: list[int], patch: int, size: int | None, batch_size: int) -> list[list[int]]:
    """Images that have one size after padding, together; in the order of the first of each batch."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in todo:
        if size is None:
            try:
                with Image.open(images.images[index]) as header:
                    width, height = header.size
            except Exception:  # whatever is wrong with it, reading it will say so
                width = height = 0
            groups[-height // patch, -width // patch].append(index)
        else:
            groups[size, size].append(index)
    batches = [
        group[start : start + batch_size] for group in groups.values() for start in range(0, len(group), batch_size)
    ]
    return sorted(batches)


class _Pictures(Dataset):
    """(uint8 [H, W, 3] as the network takes it, original (H, W)); for an unreadable one, the sentence that says so."""

    def __init__(self, images: BoxSet, size: int | None):
        self.images, self.size = images, size

    def __getitem__(self, index: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            picture = self.images.read_image(index)
        except (ValueError, OSError) as error:
            return str(error)
        original = (picture.shape[0], picture.shape[1])
        return (picture if self.size is None else resample(picture, self.size, self.size)), original


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.run(discover, Settings, __doc__, arguments)


if __name__ == "__main__":
    main()
