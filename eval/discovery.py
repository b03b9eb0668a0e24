"""Object discovery without labels: LOST, TokenCut or MaskCut on the features of any ViT, scored by CorLoc or AP.

    python eval/discovery.py                      # on what is there: see "Without flags" in docs/evaluation.md
    python eval/discovery.py --method tokencut --ckpt dino_vits16.pth --data.name voc07 --data.root VOCdevkit
    python eval/discovery.py --method maskcut --ckpt runs/photos --data.name coco --data.root coco --out found
    python eval/discovery.py --method lost --every-block --ckpt runs/photos --data.name voc12 --data.root VOCdevkit
    python eval/discovery.py --method tokencut --ckpt runs/photos --data.name folder --data.root my_photos --out found

Images keep their size, as published, and are padded with zeros at the right and the bottom to a multiple of the patch
(MaskCut: squares of 480 pixels by Lanczos, without the CRF of its release). LOST and TokenCut find one object an image;
CorLoc is the share of images in which its box has an IoU of at least 0.5 with any true one; images without a true box
are left out of it. MaskCut finds up to three, scored by COCO's AP without classes, in which every image counts.

With --out: discovery.json, discovery.md and pictures, discovery.png; and detections.json (boxes and masks in COCO's
result format). Unreadable images of a folder are left out and listed; in a set with labels they are an error.
An interrupted run with --out is continued by the same command. torchrun shares the images out.
"""

import skipless.common.interruption  # noqa: F401

import json
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from skipless.common import cli
from skipless.common.files import write_text
from skipless.datasets.labels.counts import BOX_COUNTS, describe_split
from skipless.eval import defaults
from skipless.eval.backbones import choose_block
from skipless.eval.evaluation import EvaluationSettings, SheetSettings, announce, finish, prepare
from skipless.eval.objects.data import DataSettings, open_data
from skipless.eval.objects.report import draw, report
from skipless.eval.objects.scores import detections, graph_report, score
from skipless.eval.objects.search import FeatureChoice, Method, Search, choose_features, find_objects

PLACES = {
    "VOCdevkit/VOC2007": ("voc07", "VOCdevkit"),
    "VOCdevkit/VOC2012/Annotations": ("voc12", "VOCdevkit"),
    "coco/train2014": ("coco20k", "coco"),
    "coco/annotations/instances_val2017.json": ("coco", "coco"),
}
PICTURES = 12
# From CutLER's release, which refines masks by a CRF, and lets the sign of LAPACK's eigenvector decide whose corners
# count.
MASKCUT_DIFFERS = ("no-crf", "corners-by-seed")


@dataclass
class Settings(SheetSettings, EvaluationSettings):
    """Object discovery."""

    data: DataSettings
    method: Method = "tokencut"
    """lost (arXiv 2109.14279), tokencut (arXiv 2202.11539) or maskcut (CutLER, arXiv 2301.11320)."""
    features: FeatureChoice = "auto"
    """What patches are compared by. keys is the published way; where the trained bias of the keys makes all patches
    alike (the run warns of it), keys_without_bias. auto is that for the families of DINOv2, and keys for all others."""
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
    _: KW_ONLY
    untrained: bool = False
    """Measure the checkpoint's architecture with random weights: the floor its figure stands on."""
    batch_size: int = 8
    """Images of one padded size that go through the network together. Changes speed and memory alone."""


def evaluate(settings: Settings) -> dict[str, Any]:
    """Find objects as `settings` say, score them, write what `settings.out` asks for, and return the result.

    Raises:
        ValueError, FileNotFoundError: a checkpoint, data or settings that cannot be used.
    """
    # In float32, as published: thresholds on cosines and signs of eigenvectors hang on small differences.
    context = prepare(settings, "discovery")
    features = context.recorded["features"] = choose_features(settings.features, context.backbone)
    blocks = choose_block(settings.block, settings.every_block, context.backbone)
    size = check(settings, context.backbone.patch)
    images, annotations = open_data(settings.data)
    official = BOX_COUNTS.get((images.name, images.split))
    description = describe_split(images.name, images.split, len(images), official)
    dropped = {}
    if settings.no_hard:
        images, boxes, without = images.without_hard()
        dropped = {"dropped_boxes": boxes, "dropped_images": without}
        description += f", less {without:,} without an easy box"
    protocol = protocol_id(replace(settings, features=features), blocks[-1], size)
    announce(context, protocol, f"{description}; {sum(map(bool, map(len, images.boxes))):,} with boxes")
    if context.out:
        context.out.mkdir(parents=True, exist_ok=True)

    shown = np.linspace(0, len(images) - 1, min(PICTURES, len(images))).round().astype(int).tolist()
    search = Search(settings.method, features, blocks, size, settings.tau, settings.batch_size, context.workers)
    entries = find_objects(context.backbone, images, search, shown, context.out)
    unreadable = [entry["unreadable"] for entry in entries if "unreadable" in entry]
    entries = [entry for entry in entries if "unreadable" not in entry]
    if not entries:
        raise ValueError(f"{settings.data.root}: none of its {len(images):,} images can be read ({unreadable[0]})")
    scores = [
        score(images, annotations, entries, settings.method, settings.seed, place) for place in range(len(blocks))
    ]
    last = len(blocks) - 1
    details = {
        **scores[last]["details"],
        "data": description,
        **dropped,
        "block": blocks[last] + 1,
        "image_size": size,
        **graph_report(entries, last),
        "unreadable": unreadable,
    }
    if settings.every_block:
        details["every_block"] = [
            {
                "block": block + 1,
                "metric": figure["metric"],
                "value": figure["value"],
                "interval_95": figure["details"].get("interval_95"),
            }
            for block, figure in zip(blocks, scores, strict=True)
        ]
    files = {
        "detections.json": lambda path: write_text(path, json.dumps(detections(images, entries, last)) + "\n"),
        "discovery.png": lambda path: draw(images, entries, last, shown, settings.method, path),
    }
    result = finish(
        context, protocol, images, scores[last]["metric"], scores[last]["value"], details, report, files, official
    )
    if context.first and context.out:
        for log in context.out.glob("found-*.jsonl"):
            log.unlink()
    return result


def check(settings: Settings, patch: int) -> int | None:
    """The side of the squares that images are resized to, None for the original size.

    Raises:
        ValueError: settings that have no effect, or a size that is no multiple of the patch.
    """
    if settings.method == "lost" and settings.tau is not None:
        raise ValueError("tau has no effect on lost, whose threshold is 0; leave it out")
    if settings.no_hard and settings.data.name not in ("voc07", "voc12", "scenes"):
        raise ValueError(
            f"no-hard: {settings.data.name} does not tell which boxes are difficult or truncated; leave it out"
        )
    if settings.size is None and settings.method == "maskcut":
        return max(480 // patch, 1) * patch
    if settings.size is not None and (settings.size % patch or settings.size < patch):
        raise ValueError(f"size is {settings.size}; it must be a multiple of the patch, {patch} pixels")
    return settings.size


def protocol_id(settings: Settings, block: int, size: int | None) -> str:
    """As in `voc07-tokencut`, with every departure from the published way named behind it."""
    parts = [f"{settings.data.name}-{settings.method}"]
    if settings.method == "maskcut":
        parts += MASKCUT_DIFFERS
    if settings.features != "keys":
        parts.append(settings.features)
    if settings.block != "last":
        parts.append(f"block-{block + 1}")
    if settings.size is not None:
        parts.append(f"{size}px")
    if settings.tau is not None:
        parts.append(f"tau-{settings.tau:g}")
    if settings.no_hard:
        parts.append("no-hard")
    return "/".join(parts)


fill = partial(defaults.fill, "discovery", PLACES, "voc07", [])

main = partial(cli.run, evaluate, Settings, __doc__, fill=fill)

if __name__ == "__main__":
    main()
