"""Search for objects in all images of a data set: batches of one size, masks in pixels, interrupted runs continued."""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from skipless.common import distributed
from skipless.common.pixels import resample
from skipless.common.processes import one_thread
from skipless.common.progress import Progress
from skipless.datasets.labels.boxes import BoxSet
from skipless.eval.backbones import Backbone, FeatureKind, pad_to_patch
from skipless.eval.entries import append_entries, read_entries
from skipless.eval.features import data_sha256
from skipless.eval.objects.localization import Localization, bounding_box, lost, maskcut, tokencut
from skipless.eval.objects.scores import COMPLETE
from skipless.eval.reading import Unreadable, read_batches_leniently

SMALL_GRAPH = 1600
"""Patches up to which one thread is faster than several."""

EARLY = 8
"""Images after which graphs that say nothing are warned of."""

Method = Literal["lost", "tokencut", "maskcut"]
FeatureChoice = Literal["auto", FeatureKind]


@dataclass(frozen=True)
class Search:
    """How objects are looked for."""

    method: Method
    features: FeatureKind
    """What patches are compared by."""
    blocks: list[int]
    """Blocks, from 0, whose features are searched; the last is the one that is shown."""
    size: int | Literal["nearest"] | None
    """Side in pixels of the squares that images are resized to; nearest: sides are resized to the nearest multiple of
    the patch; None: they keep their size, and are padded to a multiple of the patch."""
    tau: float | None
    """Threshold of tokencut and maskcut; None for the published one."""
    batch_size: int
    workers: int


def find_objects(
    backbone: Backbone, images: BoxSet, search: Search, shown: list[int], out: Path | None
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
        "settings": [search.method, search.features, search.blocks, search.size, search.tau],
        **({"squares": "lanczos"} if search.method == "maskcut" else {}),
    }
    known: dict[int, dict[str, Any]] = {}
    for path in sorted(out.glob("found-*.jsonl")) if out else []:
        known |= read_entries(path, identity)
    distributed.any_process(False)  # all have read before one writes
    log = out / f"found-{distributed.rank()}.jsonl" if out else None
    rest = [index for index in range(len(images)) if index not in known]
    batches = _batches(images, rest, backbone.patch, search)[distributed.rank() :: distributed.world_size()]
    loader = read_batches_leniently(partial(_read_picture, images, search, backbone.patch), batches, search.workers)
    threshold: dict[str, Any] = {} if search.tau is None else {"tau": search.tau}
    locate = {"lost": lost, "tokencut": partial(tokencut, **threshold), "maskcut": partial(maskcut, **threshold)}
    mine: list[dict[str, Any]] = []
    share = sum(map(len, batches))
    with Progress(total=share, desc=search.method, unit="image", active=distributed.rank() == 0) as progress:
        for batch, pictures in zip(batches, loader, strict=True):
            entries = _search_batch(backbone, images, batch, pictures, search, locate[search.method], shown)
            if log:
                append_entries(log, identity, entries)
            few = len(mine) < EARLY <= len(mine) + len(entries)
            mine += entries
            progress.update(len(batch))
            if few and (sentence := complete_graphs(mine, search.features)) and distributed.rank() == 0:
                progress.write(sentence)
    for part in distributed.gather_objects(mine):
        known |= {entry["index"]: entry for entry in part}
    return [known[index] for index in range(len(images))]


def choose_features(features: FeatureChoice, backbone: Backbone) -> FeatureKind:
    """What auto means for a backbone: in DINOv2's weights the bias of the keys drowns what tells patches apart."""
    if features != "auto":
        return features
    return "keys_without_bias" if backbone.family.startswith("DINOv2") else "keys"


def decode(item: dict[str, Any]) -> np.ndarray:
    """The mask of one of an entry's objects, bool [H, W]."""
    return coco_mask.decode({**item["rle"], "counts": item["rle"]["counts"].encode()}).astype(bool)


def complete_graphs(entries: list[dict[str, Any]], features: FeatureKind) -> str:
    """A warning where most of the graphs say nothing; else nothing."""
    found = [entry["blocks"][-1]["edges"] for entry in entries if "blocks" in entry]
    complete = sum(edges > COMPLETE for edges in found)
    if 2 * complete <= len(found):
        return ""
    advice = "; stop, and try --features keys_without_bias" if features == "keys" else ""
    return (
        f"warning: in {complete} of the first {len(found)} images nearly all patches count as similar, and what is "
        f"found there means little{advice}"
    )


def _search_batch(
    backbone: Backbone,
    images: BoxSet,
    batch: list[int],
    pictures: list[Any],
    search: Search,
    locate: Any,
    shown: list[int],
) -> list[dict[str, Any]]:
    """Entries of the images of a batch, given what the loader made of them."""
    entries: list[dict[str, Any]] = []
    # It is one group, unless a header told another size than the picture has: an EXIF orientation does.
    groups: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for index, picture in zip(batch, pictures, strict=True):
        if not isinstance(picture, Unreadable):
            groups[_padded(picture[0].shape, backbone.patch)].append((index, *picture))
        elif images.name == "folder":
            entries.append({"index": index, "unreadable": picture.reason})
        else:  # a set with labels is scored as a whole; any folder of photographs has damaged ones
            raise ValueError(picture.reason)
    for group in groups.values():
        entries += _search_group(backbone, images, group, search, locate, shown)
    return entries


def _search_group(
    backbone: Backbone,
    images: BoxSet,
    group: list[tuple[int, np.ndarray, tuple[int, int]]],
    search: Search,
    locate: Any,
    shown: list[int],
) -> list[dict[str, Any]]:
    """Entries of images of one padded size: index, pixels as the network takes them, original height and width."""
    patch = backbone.patch
    for index, picture, _ in group:
        backbone.require_room(images.images[index], *picture.shape[:2])
    padded = [pad_to_patch(backbone.normalize(picture[None]), patch) for _, picture, _ in group]
    features = backbone.features(torch.cat(padded), search.blocks, search.features)
    entries: list[dict[str, Any]] = [
        {"index": index, "size": list(original), "blocks": []} for index, _, original in group
    ]
    for block, outputs in zip(search.blocks, features, strict=True):
        finite = outputs.patches.isfinite().flatten(1).all(1)
        if not finite.all():
            path = images.images[group[int(finite.int().argmin())][0]]
            raise ValueError(
                f"{path}: {search.features} of block {block + 1} of {backbone.path} are NaN or infinite; "
                "check the checkpoint"
            )
        _, h, w, _ = outputs.patches.shape
        with one_thread() if h * w <= SMALL_GRAPH else nullcontext():
            located_group = locate(outputs.patches)
        for entry, (index, picture, original), located in zip(entries, group, located_group, strict=True):
            objects: list[Localization] = located if isinstance(located, list) else [located]
            masks = [_pixels(item.mask, picture.shape[:2], original, patch) for item in objects]
            entry["blocks"].append(
                {
                    "objects": [{"box": _box(mask), "rle": _rle(mask)} for mask in masks],
                    "edges": round(objects[0].edges, 4),
                    "degenerate": objects[0].degenerate,
                    "fallback": any(item.fallback for item in objects),
                }
            )
            if block == search.blocks[-1] and index in shown:
                entry["map"] = objects[0].map.round(4).tolist()
    return entries


def _pixels(mask: np.ndarray, fed: Sequence[int], original: Sequence[int], patch: int) -> np.ndarray:
    """A mask of patches in pixels of the original image: bool [H, W]. A pixel takes the patch its center lies in."""
    rows, columns = (((2 * np.arange(o) + 1) * f // (2 * o)) // patch for o, f in zip(original, fed, strict=True))
    return mask[rows[:, None], columns]


def _box(mask: np.ndarray) -> list[int]:
    """Zeros for an empty mask: an object smaller than a pixel, after a large image was resized."""
    return list(bounding_box(mask)) if mask.any() else [0, 0, 0, 0]


def _rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


def _batches(images: BoxSet, indices: list[int], patch: int, search: Search) -> list[list[int]]:
    """Images that have one size after padding, together; in the order of the first of each batch."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in indices:
        height = width = search.size if isinstance(search.size, int) else 0
        if not isinstance(search.size, int):
            try:
                with Image.open(images.images[index]) as header:
                    width, height = header.size
            except Exception:  # whatever is wrong with it, reading it will say so
                pass
        if search.size == "nearest":
            height, width = _nearest(height, patch), _nearest(width, patch)
        groups[_padded((height, width), patch)].append(index)
    step = search.batch_size
    return sorted(group[start : start + step] for group in groups.values() for start in range(0, len(group), step))


def _padded(shape: Sequence[int], patch: int) -> tuple[int, int]:
    """Patches in a column and in a row, after padding, of an image [H, W, ...]."""
    return -(-shape[0] // patch), -(-shape[1] // patch)


def _nearest(side: int, patch: int) -> int:
    """The multiple of the patch that is nearest to a side, at least one patch."""
    return max(round(side / patch), 1) * patch


def _read_picture(images: BoxSet, search: Search, patch: int, index: int) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 [H, W, 3] as the network takes it, and the original (H, W)."""
    picture, size = images.read_image(index), search.size
    original = (picture.shape[0], picture.shape[1])
    if size is None:
        return picture, original
    if size == "nearest" or search.method == "maskcut":  # by Lanczos, as in TokenCut's and CutLER's releases
        height, width = (_nearest(side, patch) if size == "nearest" else size for side in original)
        return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS)), original
    return resample(picture, size, size), original
